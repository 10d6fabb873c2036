"""Sweeps: wandb's format, the trials they draw, early stopping, resuming after a kill."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import psutil
import pytest
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from data.storage import as_path
from launch import sweep_progress
from launch.sweep_definition import check_same, prepare_folder
from launch.sweep_file import Hyperband, load_sweep
from launch.sweep_parameters import Parameter
from launch.sweep_search import bands, read_history, should_stop
from launch.sweep_trial import end_trials, stop_orphan
from launch.trial import main as run_trial
from tests.launch.sweeps import GRID, command, write
from tests.s3 import S3Server
from trainer.config import ConfigError, load_config
from trainer.metrics.jsonl import read_metrics
from trainer.report.sweep import Trial, groups, sentences

SWEEPS = sorted(p for p in Path("configs/sweeps").glob("*.yaml") if p.name != "base.yaml")


def test_history_has_the_points_that_wandb_gets(tmp_path: Path) -> None:
    """Every third step, and those that were evaluated or have layer stats."""
    records = [{"step": step, "loss": float(step)} for step in range(1, 8)]
    records[3] |= {"layers": {}}
    records[6] |= {"validation_loss": 1.0}
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 8, "lo')
    assert read_history(path, "loss", 3) == [3.0, 4.0, 6.0, 7.0]
    assert read_history(path, "layers", 3) == []  # not a number


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweeps_fit_the_config(path: Path) -> None:
    assert load_sweep(path).trials >= 12
    assert not re.search(r"\d[eE]-", path.read_text()), "wandb's YAML reads 1e-3 as text"


@pytest.mark.parametrize(
    ("given", "low", "high"),
    [
        ({"min": 1, "max": 4}, 1, 4),
        ({"min": 0.5, "max": 2.0}, 0.5, 2),
        ({"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.25}, 0, 1),
        ({"distribution": "log_uniform", "min": -2.0, "max": 1.0}, 0.1353, 2.7183),
        ({"distribution": "inv_log_uniform", "min": 0.0, "max": 1.0}, 0.3678, 1),
        ({"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1}, 1e-4, 1e-1),
        ({"distribution": "normal", "mu": 5.0, "sigma": 0.1}, 4.4, 5.6),
        ({"distribution": "log_normal", "mu": 0.0, "sigma": 0.1}, 0.6, 1.7),
        ({"value": 3}, 3, 3),
        ({"values": [1, 2]}, 1, 2),
    ],
)
def test_values_stay_in_their_distribution(given: dict, low: float, high: float) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    parameter = Parameter(**given)
    drawn = [parameter.suggest(study.ask(), "x") for _ in range(40)]
    assert all(low <= x <= high * 1.001 for x in drawn)
    if parameter.choices is not None:
        assert set(drawn) == set(parameter.choices)


def test_arguments_are_those_of_wandb_agent(tiny: Path, tmp_path: Path) -> None:
    sweep = load_sweep(write(tiny, tmp_path, GRID))
    arguments = {"a.b": 1e-5, "c": True, "d": "muon", "e": 3}
    theirs = create_sweep_command_args({"args": {k: {"value": v} for k, v in arguments.items()}})
    assert sweep.trial_command(arguments)[5:] == theirs["args_no_hyphens"]


FAKE = """
for word; do case $word in run_dir=*) folder=$(eval echo "${word#run_dir=}");; esac; done
echo '{"step": 1, "validation_loss": 2.5, "loss": 3.0}' >> "$folder/metrics.jsonl"
if [ -e %s ]; then exit 0; fi
touch %s; echo 'v4: error: the moon is full' >&2; echo 'a last line'; %s
"""


@pytest.mark.parametrize(
    ("end", "reason"),
    [("exit 2", "the moon is full; see "), ("kill -9 $$", "was killed by SIGKILL (signal 9)")],
)
def test_a_failed_trial_is_tried_again_by_the_next_call(
    tiny: Path, tmp_path: Path, end: str, reason: str
) -> None:
    (tmp_path / "fake.sh").write_text(FAKE % (tmp_path / "mark", tmp_path / "mark", end))
    file, out = write(tiny, tmp_path, GRID), tmp_path / "out"
    text = file.read_text().splitlines()
    text[1] = f'command: [bash, {tmp_path / "fake.sh"}, {tiny}, "${{args_no_hyphens}}"]'
    file.write_text("\n".join(text))
    sweep = [argument for argument in command(file, out) if argument != "--jobs=2"]

    def states() -> list[str]:
        trials = json.loads((out / "sweep.json").read_text())["trials"]
        return [trial["state"] for trial in trials]

    done = subprocess.run(sweep, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert f"trial 0 failed: optim.learning_rate=0.001: {reason}" in done.stdout
    assert "failed: trials 0; the same command tries them again" in done.stdout
    assert states() == ["fail", "complete"]
    done = subprocess.run(sweep, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "trial 0 complete" in done.stdout, done.stderr
    assert "trial 1" not in done.stdout.split("best:")[0]  # complete
    assert states() == ["complete", "complete"]

    other = out / "trial-0000/metrics.jsonl"
    other.write_text(other.read_text().replace("2.5", "3.5"))
    (out / "trial-0001/metrics.jsonl").unlink()  # its value is in the study
    done = subprocess.run(sweep, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "trial-0001/metrics.jsonl: is lost or damaged; validation_loss is" in done.stdout
    assert "the best: optim.learning_rate=0.01" in done.stdout
    other.unlink()
    done = subprocess.run(sweep, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "best: trial 0, validation_loss 2.5000" in done.stdout


def test_a_trial_that_somebody_stopped_is_not_complete(tiny: Path, tmp_path: Path) -> None:
    """It ends with 0 after a checkpoint; its metric is that of an early step, and no result."""
    mark = tmp_path / "mark"
    save = f"touch {mark}; mkdir -p $folder/checkpoints/step-00000001; exit 0"
    finish = "mkdir -p $folder/checkpoints/step-00000006; exit 0"
    script = FAKE.replace("exit 0; fi", f"{finish}; fi") % (mark, mark, save)
    (tmp_path / "fake.sh").write_text(script.replace("echo 'v4: error: the moon is full' >&2;", ""))
    file, out = write(tiny, tmp_path, GRID), tmp_path / "out"
    text = file.read_text().splitlines()
    text[1] = f'command: [bash, {tmp_path / "fake.sh"}, {tiny}, "${{args_no_hyphens}}"]'
    file.write_text("\n".join(text))
    sweep = [argument for argument in command(file, out) if argument != "--jobs=2"]
    done = subprocess.run(sweep, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "trial 0 failed: optim.learning_rate=0.001: it was stopped before its" in done.stdout
    assert "best: trial 1, " in done.stdout
    done = subprocess.run(sweep, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "trial 0 complete" in done.stdout, done.stderr


def test_a_trial_whose_sweep_was_killed_is_taken_up_by_another(tiny: Path, tmp_path: Path) -> None:
    """Two calls share the trials; the one that is left runs both."""
    file, out, go = write(tiny, tmp_path, GRID), tmp_path / "out", tmp_path / "go"
    wait = f"while [ ! -e {go} ]; do sleep 0.1; done\n"
    (tmp_path / "fake.sh").write_text(FAKE.replace("echo '{", wait + "echo '{") % ("/", "/", ""))
    text = file.read_text().splitlines()
    text[1] = f'command: [bash, {tmp_path / "fake.sh"}, {tiny}, "${{args_no_hyphens}}"]'
    file.write_text("\n".join(text))
    sweep = [argument for argument in command(file, out) if argument != "--jobs=2"]
    running = []
    for number in range(2):
        running.append(subprocess.Popen(sweep, stdout=subprocess.PIPE, text=True))
        limit = time.monotonic() + 100
        while not (out / f"trial-000{number}/process.json").is_file():
            assert running[-1].poll() is None and time.monotonic() < limit
            time.sleep(0.05)
    first, second = running
    first.kill()
    first.communicate()
    go.touch()
    output, _ = second.communicate(timeout=100)
    assert second.returncode == 0 and "trial 0 complete" in output and "best: trial" in output
    trials = json.loads((out / "sweep.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["complete", "complete"]


def test_progress_has_step_loss_and_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(sweep_progress.time, "monotonic", lambda: now[0])
    trial, path = sweep_progress.TrialProgress(3, tmp_path, 100), tmp_path / "metrics.jsonl"
    assert trial.describe() == "trial 3: starting"
    path.write_text('{"step": 10, "loss": 3.5}\n')
    assert trial.describe() == "trial 3: step 10/100, loss 3.5000"
    path.write_text('{"step": 20, "loss": 3.25}\n{"step": 21, "lo')
    now[0] += 5.0
    assert trial.describe() == "trial 3: step 20/100, loss 3.2500, 0:00:40 left"
    resumed = sweep_progress.TrialProgress(3, tmp_path, 100)
    assert resumed.describe() == "trial 3: resuming after step 20"


def test_hyperband_as_wandb_documents_it() -> None:
    assert bands(Hyperband(type="hyperband", min_iter=3), 100) == [3, 9, 27, 81]
    assert bands(Hyperband(type="hyperband", max_iter=27, s=2), 100) == [3, 9]
    rule = Hyperband(type="hyperband", min_iter=1, eta=2)
    histories = [[9.0, x] for x in (4.0, 3.0, 2.0, 1.0)]
    stopped = [should_stop(rule, "minimize", own, histories) for own in histories]
    assert stopped == [True, False, False, False]  # the threshold is sorted[int(4 / 2)] = 3
    stopped = [should_stop(rule, "maximize", own, histories) for own in histories]
    assert stopped == [False, False, False, True]
    assert not should_stop(rule, "minimize", [9.0], histories)
    assert not should_stop(rule, "minimize", [], [[], []])
    assert not should_stop(rule, "minimize", [9.0, 9.0], [[], [9.0, 9.0]])
    assert should_stop(rule, "minimize", [9.0, 9.0], [[], [9.0, 9.0], [8.0, 8.0], [1.0, 1.0]])


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (GRID.replace("learning_rate", "lerning_rate"), "optim.lerning_rate"),
        (GRID.replace("1e-2", "-1.0"), "optim.learning_rate"),
        (GRID.replace("grid", "random"), "run_cap"),
        ("method: grid\nparameters:\n  optim.learning_rate: {min: 0.1, max: 0.2}\n", "values"),
    ],
)
def test_a_wrong_sweep_is_one_sentence_before_training(
    tiny: Path, tmp_path: Path, body: str, part: str
) -> None:
    done = subprocess.run(
        command(write(tiny, tmp_path, body), tmp_path / "out"), capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert part in done.stderr and "sweep.yaml" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_program_is_one_sentence_before_training(tiny: Path, tmp_path: Path) -> None:
    file = write(tiny, tmp_path, GRID)
    file.write_text(file.read_text().replace("${env}", "python4"))
    with pytest.raises(ConfigError, match=r"sweep\.yaml: command: 'python4' is not a program"):
        load_sweep(file)


def test_a_sweep_trains_its_trials(tiny: Path, tmp_path: Path) -> None:
    body = "method: grid\nparameters: {optim.learning_rate: {value: 1e-2}, steps: {value: 2}}\n"
    file, out = write(tiny, tmp_path, body), tmp_path / "out"
    done = subprocess.run(command(file, out), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (trial,) = json.loads((out / "sweep.json").read_text())["trials"]
    assert trial["state"] == "complete"
    records = read_metrics(out / trial["folder"] / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    assert "the best: " in done.stdout
    assert (out / "report.html").is_file()


def test_a_sweep_goes_on_when_the_reader_of_its_stdout_has_gone() -> None:
    code = """
import os
from launch.sweep_progress import SweepDisplay
SweepDisplay(1).line("trial 0 starts")
os._exit(0)
"""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, check=False)
    os.close(writer)
    assert done.returncode == 0


@pytest.mark.parametrize("body", [GRID, GRID.replace("grid", "random") + "run_cap: 2\n"])
def test_a_sweep_resumes_with_the_same_config(tiny: Path, tmp_path: Path, body: str) -> None:
    config = tmp_path / "base.yaml"
    config.write_text(tiny.read_text())
    sweep = load_sweep(write(config, tmp_path, body))
    check_same(sweep, tmp_path, 0)
    definition = (tmp_path / "definition.json").read_text()
    for change in ("", "\nmetrics: {wandb: {mode: offline}}\n", "\nrun_dir: elsewhere\n"):
        text = tiny.read_text()
        key = change.strip().partition(":")[0]
        lines = [line for line in text.splitlines() if not (key and line.startswith(f"{key}:"))]
        config.write_text("\n".join(lines) + change)
        check_same(sweep, tmp_path, 0)
    config.write_text(tiny.read_text().replace("global_batch_size: 4", "global_batch_size: 8"))
    with pytest.raises(
        ConfigError, match=r"base\.yaml: data.global_batch_size is 8, and was 4 in the trials of"
    ):
        check_same(sweep, tmp_path, 0)
    with pytest.raises(ConfigError, match="another definition or seed"):
        check_same(sweep, tmp_path, 1)
    assert (tmp_path / "definition.json").read_text() == definition
    (tmp_path / "definition.json").write_text("{")
    with pytest.raises(ConfigError, match=r"definition\.json: is damaged"):
        check_same(sweep, tmp_path, 0)


def test_a_sweep_resumes_on_the_same_text(tiny: Path, tmp_path: Path) -> None:
    """Trials on other shards, or with another validation text, cannot be compared."""
    shards = tmp_path / "shards"
    shutil.copytree(tiny.parent / "shards", shards)
    config = tmp_path / "base.yaml"
    config.write_text(tiny.read_text().replace(str(tiny.parent / "shards"), str(shards)))
    sweep = load_sweep(write(config, tmp_path, GRID))
    for _ in range(2):
        check_same(sweep, tmp_path, 0)
    manifest = shards / "manifest.json"
    content = json.loads(manifest.read_text())
    for key, what in (("digest", "text"), ("tokenizer_hash", "tokenizer")):
        manifest.write_text(json.dumps({**content, key: "f" * 64}))
        with pytest.raises(
            ConfigError, match=f"has another {what} .f{{16}}….? than when the trials"
        ):
            check_same(sweep, tmp_path, 0)
    manifest.unlink()
    check_same(sweep, tmp_path, 0)  # the trials end, and say why
    manifest.write_text(json.dumps(content))
    check_same(sweep, tmp_path, 0)


def test_a_definition_of_before_gets_the_config(tiny: Path, tmp_path: Path) -> None:
    sweep = load_sweep(write(tiny, tmp_path, GRID))
    path = tmp_path / "definition.json"
    path.write_text(json.dumps({"seed": 0, **sweep.model_dump(mode="json")}))
    check_same(sweep, tmp_path, 0)
    assert json.loads(path.read_text())["config"]["seed"] == 3


def test_trials_of_wandb_agent_share_no_folder(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words))
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    for run_id in ("one", "two"):
        monkeypatch.setenv("WANDB_RUN_ID", run_id)
        run_trial([str(tiny), "checkpoint.folder=s3://bucket/runs"])
        words = started[-1]
        config = load_config(tiny, words[words.index(str(tiny)) + 1 :])
        assert config.run_dir == Path("runs/sweeps/abc", run_id)
        assert config.checkpoint.folder == f"s3://bucket/runs/abc/{run_id}"
    assert run_trial([str(tiny), "steps=many"]) == 2 and len(started) == 2
    assert capfd.readouterr().err.startswith("v4: error: command line: steps")


@pytest.mark.slow
def test_every_trial_has_its_own_checkpoints_in_object_storage(
    tiny: Path, tmp_path: Path, s3: S3Server
) -> None:
    """Below one `checkpoint.folder`, where another sweep has another name, as nothing resumes."""
    folder = as_path(f"{s3.make_bucket('sweeps')}/runs")
    config = tmp_path / "base.yaml"
    config.write_text(tiny.read_text().replace("{every: 0}", f"{{every: 0, folder: {folder}}}"))
    file = write(config, tmp_path, GRID)
    sweep = load_sweep(file)
    names = {prepare_folder(sweep, tmp_path / place / "out", 0) for place in ("a", "b", "a")}
    assert len(names) == 2
    done = subprocess.run(
        command(file, tmp_path / "a/out"), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and "best: trial" in done.stdout, done.stdout + done.stderr
    (name,) = folder.names()
    assert name == prepare_folder(sweep, tmp_path / "a/out", 0)
    for number in range(2):
        trial_folder = f"trial-{number:04d}"
        assert "step-00000006" in (folder / name / trial_folder).names()
        of_trial = load_config(tmp_path / "a/out" / trial_folder / "config.yaml")
        assert (
            of_trial.is_complete and of_trial.checkpoint.folder == f"{folder}/{name}/{trial_folder}"
        )


def test_a_sweep_of_a_copied_run_trains_in_its_own_folder(tiny: Path, tmp_path: Path) -> None:
    """Its config.yaml names the original as run_dir; neither of the two is written."""
    original, copy = tmp_path / "original", tmp_path / "copy"
    original.mkdir()
    (original / "config.yaml").write_text(
        load_config(tiny, [f"run_dir={original}", "steps=1"]).to_yaml()
    )
    (original / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    shutil.copytree(original, copy)
    before = {path: path.read_bytes() for folder in (original, copy) for path in folder.iterdir()}
    body = "method: grid\nparameters: {optim.learning_rate: {value: 1e-2}}\n"
    file = write(copy / "config.yaml", tmp_path, body)
    sweep = command(file, tmp_path / "out")
    done = subprocess.run(sweep, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/trial-0000/checkpoints/step-00000001").is_dir()
    after = {path: path.read_bytes() for folder in (original, copy) for path in folder.iterdir()}
    assert after == before


@pytest.mark.slow
def test_a_killed_sweep_resumes(tiny: Path, tmp_path: Path) -> None:
    file, out = write(tiny, tmp_path, GRID + "  seed: {values: [1, 2]}\n"), tmp_path / "out"
    process = subprocess.Popen(command(file, out), stdout=subprocess.DEVNULL)
    try:
        started = out / "trial-0002" / "process.json"  # so one trial at least has ended
        limit = time.monotonic() + 120
        while not started.is_file() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        assert started.is_file()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command(file, out), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" complete: ") in (1, 2, 3)  # not those that had ended
    trials = json.loads((out / "sweep.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["complete"] * 4
    for trial in trials:
        records = read_metrics(out / trial["folder"] / "metrics.jsonl")
        assert [record["step"] for record in records] == list(range(1, 7))
    assert "the best: optim.learning_rate=0.01" in done.stdout
    assert (out / "report.html").is_file()


def test_only_the_process_that_a_killed_sweep_started_is_terminated(tmp_path: Path) -> None:
    """A process id may belong to another program by now; the time of its creation tells."""
    stop_orphan(tmp_path)  # a trial that was not started
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        born = psutil.Process(process.pid).create_time()
        other, same = str(tmp_path / "original"), str(tmp_path.resolve())
        for recorded, folder, is_terminated in (
            (born - 60.0, same, False),
            (born, other, False),  # this folder is a copy of that one
            (born, same, True),
        ):
            record = {"pid": process.pid, "born": recorded, "folder": folder}
            (tmp_path / "process.json").write_text(json.dumps(record))
            stop_orphan(tmp_path)
            status = process.poll()
            assert (status is not None) == is_terminated
    for damaged in ("", "[]", '{"pid": null}'):
        (tmp_path / "process.json").write_text(damaged)
        stop_orphan(tmp_path)


def test_a_signal_ends_the_wait_for_an_earlier_trial(tmp_path: Path) -> None:
    code = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(9)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        record = {"pid": process.pid, "born": psutil.Process(process.pid).create_time()}
        (tmp_path / "process.json").write_text(json.dumps(record))
        stop_orphan(tmp_path, lambda: True)
        assert process.poll() is None
        process.kill()


def test_a_second_signal_kills_a_trial_that_does_not_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.activity.REPORT_SECONDS", (0.1, 60.0))
    # A script's shell ignores SIGQUIT for its background jobs, which may be this suite.
    code = "import signal, time; signal.signal(signal.SIGQUIT, signal.SIG_DFL)"
    code += "; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(9)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        signals = [1, 1, 1]
        end_trials([process], lambda: signals.pop() if signals else 2)
        assert process.returncode == -signal.SIGQUIT
    assert "waiting for the trials to save; a second signal kills them" in capsys.readouterr().err


def test_seeds_are_averaged_and_the_others_tuned() -> None:
    values = {("muon", 1): (2.0, 2.2), ("muon", 2): (3.0, 3.0), ("adamw", 1): (9.0, 9.0)}
    values["adamw", 2] = (2.4, 2.8)
    trials = [
        Trial("t", "complete", {"kind": kind, "rate": rate, "seed": seed}, [], value)
        for (kind, rate), pair in values.items()
        for seed, value in enumerate(pair)
    ]
    lines = sentences(groups(trials, "minimize"), "minimize", "validation_loss")
    assert lines[0] == "the best: kind=muon rate=1: validation_loss 2.1000 ± 0.1414"
    # sqrt(0.02 / 2 + 0.08 / 2) = 0.2236
    assert lines[1].startswith("kind: muon beats adamw by 0.5000 ± 0.2236 nats of validation_loss")
    assert len(lines) == 2


@pytest.mark.parametrize(("goal", "better"), [("minimize", 1.5), ("maximize", 2.5)])
def test_more_seeds_do_not_beat_a_better_mean(goal: str, better: float) -> None:
    trials = [Trial("t", "complete", {"kind": "muon", "seed": seed}, [], 2.0) for seed in (1, 2)]
    trials.append(Trial("t", "complete", {"kind": "adamw", "seed": 1}, [], better))
    _, line = sentences(groups(trials, goal), goal, "validation_loss")
    expected = "kind: muon, with more seeds, is worse than adamw by 0.5000 nats of validation_loss"
    assert line.startswith(f"{expected} (2 and 1 trials, ")
