"""The study of a sweep: the trials that it draws, and processes that share it."""

import subprocess
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from launch.sweep_definition import prepare_folder
from launch.sweep_file import Sweep, load_sweep
from launch.sweep_search import Search
from launch.sweep_study import open_study
from tests.launch.sweeps import GRID, command, write
from trainer.config import ConfigError


def open_search(sweep: Sweep, folder: Path, call: str = "one") -> Search:
    folder.mkdir(exist_ok=True)
    prepare_folder(sweep, folder, seed=7)
    return Search(sweep, folder, seed=7, call=call)


def draw(sweep: Sweep, folder: Path, reopen: bool) -> list[dict]:
    """All trials' settings; a trial's loss is its number's remainder, known at once."""
    search, settings = open_search(sweep, folder), []
    while (number := search.next()) is not None:
        settings.append(search.begin(number))
        search.finish(number, [float(number % 3)], TrialState.COMPLETE)
        if reopen:
            search = open_search(sweep, folder)
    return settings


def test_a_grid_is_complete_and_random_trials_survive_reopening(tiny: Path, tmp_path: Path) -> None:
    grid = load_sweep(write(tiny, tmp_path, GRID + "  seed: {min: 1, max: 3}\n"))
    drawn = draw(grid, tmp_path / "grid", reopen=True)
    assert drawn == [
        {"optim.learning_rate": rate, "seed": seed} for rate in (1e-3, 1e-2) for seed in (1, 2, 3)
    ]
    for method in ("random", "bayes"):
        body = f"method: {method}\nrun_cap: 12\nparameters:\n"
        body += "  optim.learning_rate: {distribution: log_uniform_values, min: 1e-4, max: 1e-1}\n"
        sweep = load_sweep(write(tiny, tmp_path, body))
        once = draw(sweep, tmp_path / method, reopen=False)
        assert once == draw(sweep, tmp_path / f"{method}-again", reopen=True)
        assert len({trial["optim.learning_rate"] for trial in once}) == 12


def test_processes_share_the_trials_of_a_sweep(tiny: Path, tmp_path: Path) -> None:
    """Each gets other trials; one that failed is tried again by another call alone."""
    body = "method: random\nrun_cap: 5\nparameters:\n  seed: {min: 1, max: 1000000}\n"
    sweep = load_sweep(write(tiny, tmp_path, body))
    one, two = (open_search(sweep, tmp_path / "out") for _ in range(2))
    numbers = [one.next(), two.next(), two.next(), one.next()]
    assert numbers == [0, 1, 2, 3]
    assert one.arguments(1) is None  # `two` is about to choose them
    chosen = two.begin(1)
    assert one.arguments(1) == chosen
    two.finish(1, [3.0], TrialState.FAIL)
    assert one.states()[1] == "fail" and one.failed() == [1] and one.unfinished() == [0, 2, 3]
    later = open_search(sweep, tmp_path / "out", "another call")
    assert later.unfinished() == [0, 1, 2, 3] and not later.failed()
    assert later.begin(1) == chosen and one.states()[1] == "running"
    assert (one.next(), two.next()) == (4, None)
    alone = open_search(sweep, tmp_path / "alone")
    while (number := alone.next()) is not None:
        assert alone.begin(number) == one.begin(number)


@pytest.mark.parametrize("method", ["grid", "random"])
def test_a_study_in_the_database_of_before_is_taken_over(
    tiny: Path, tmp_path: Path, method: str
) -> None:
    body = f"method: {method}\nrun_cap: 3\nparameters: {{seed: {{values: [5, 6, 7]}}}}\n"
    sweep, out = load_sweep(write(tiny, tmp_path, body)), tmp_path / "out"
    out.mkdir()
    study = optuna.create_study(storage=f"sqlite:///{out}/study.sqlite3", study_name="sweep")
    for number in range(2):
        trial = study.ask()
        trial.suggest_categorical("seed", ["5", "6", "7"])
        if number == 0:
            study.tell(trial, 1.5)
    expected = [int(trial.params["seed"]) for trial in study.trials]
    if method == "grid":
        expected = [5, 6]
    search = open_search(sweep, out)
    assert search.states() == {0: "complete", 1: "running"} and search.values() == {0: 1.5}
    assert [search.arguments(number) for number in range(2)] == [{"seed": x} for x in expected]
    assert search.unfinished() == [1] and (search.next(), search.next()) == (2, None)


def test_a_torn_last_line_of_the_study_is_removed_and_other_damage_is_one_sentence(
    tiny: Path, tmp_path: Path
) -> None:
    file, out = write(tiny, tmp_path, GRID), tmp_path / "out"
    open_search(load_sweep(file), out)
    journal = out / "study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole.splitlines()[-1][:-3])
    open_study(out)
    assert journal.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    for damaged, line in ((b"no journal" * 1000, 1), (b"".join([lines[0], b"\0\n", lines[2]]), 2)):
        journal.write_bytes(damaged)
        with pytest.raises(ConfigError, match=f"study.journal: line {line} is damaged"):
            open_study(out)
        assert journal.read_bytes() == damaged


def test_a_damaged_database_is_one_sentence(tiny: Path, tmp_path: Path) -> None:
    file, out = write(tiny, tmp_path, GRID), tmp_path / "out"
    out.mkdir()
    (out / "study.sqlite3").write_bytes(b"no database" * 1000)
    done = subprocess.run(command(file, out), capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr == f"v4: error: {out / 'study.sqlite3'}: file is not a database\n"
