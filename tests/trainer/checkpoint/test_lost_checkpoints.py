"""A run whose checkpoints are gone does not silently start again."""

import shutil
from pathlib import Path

import pytest

from tests.trainer.checkpoint.test_periodic import ruined
from tests.trainer.tiny import crash, steps_in_file, train
from trainer.__main__ import main
from trainer.checkpoint.unsaved import NEWEST_FILE


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Path:
    """A run of three steps with a checkpoint of each."""
    train(tiny, tmp_path / "run", "steps=3", "checkpoint.every=1")
    return tmp_path / "run"


@pytest.mark.parametrize("overrides", [(), ("steps=2",), ("checkpoint.every=0",)])
def test_metrics_without_checkpoints_are_refused(
    run: Path, overrides: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = run / "checkpoints"
    checkpoints.rename(run / "moved")
    config = (run / "config.yaml").read_bytes()
    for is_empty in (False, True):
        if is_empty:  # as a disk that is not mounted leaves it
            checkpoints.mkdir()
        assert main([str(run), *overrides]) == 2
        error = capsys.readouterr().err
        assert f"has steps up to 3, and there is no checkpoint in {checkpoints}" in error
    assert steps_in_file(run) == [1, 2, 3] and (run / "config.yaml").read_bytes() == config
    (run / "metrics.jsonl").rename(run / "metrics-1.jsonl")
    assert main([str(run), *overrides]) == 0


def test_a_link_to_nothing_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move(run / "checkpoints", run / "disk")
    (run / "checkpoints").symlink_to(run / "disk")
    assert main([str(run), "steps=4"]) == 0
    (run / "disk").rename(run / "unmounted")
    assert main([str(run), "steps=5"]) == 2
    error = capsys.readouterr().err
    assert "checkpoints is a link to" in error and error.count("\n") == 1
    assert steps_in_file(run) == [1, 2, 3, 4]


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="crash"):
        train(tiny, run, "steps=3", "checkpoint.every=0", crash_at=2)
    train(tiny, run, "steps=3")
    assert "no checkpoint was saved in 2 steps before" in capsys.readouterr().out
    assert steps_in_file(run) == [1, 2, 3]


def test_a_first_save_that_was_killed_is_repeated(run: Path) -> None:
    for checkpoint in (run / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    (run / "checkpoints/.step-00000003.tmp").mkdir()
    (run / NEWEST_FILE).unlink()  # of a run of an earlier version
    assert main([str(run), "checkpoint.every=0"]) == 0
    assert (run / "checkpoints/step-00000003").is_dir()


def test_a_first_save_that_was_skipped_or_removed_was_not_lost(tiny: Path, tmp_path: Path) -> None:
    """A crash before the next one: the run starts again."""
    for name, at in (("skipped", 1), ("removed", 2)):
        run = tmp_path / name
        settings = ("steps=5", "checkpoint.every=2", "evaluation.every=1")
        trainer = ruined(tiny, run, at, *settings)
        trainer.periodic.append(lambda state, _: crash(state.step == 3))
        with pytest.raises(RuntimeError, match="crash"):
            trainer.run()
        assert not list((run / "checkpoints").glob("step-*"))
        train(tiny, run, *settings)
        assert steps_in_file(run) == [1, 2, 3, 4, 5]


def test_what_a_stop_has_saved_is_missed(run: Path, tiny: Path, tmp_path: Path) -> None:
    """Before a regular save was due."""
    train(tiny, tmp_path / "stopped", "steps=5", "checkpoint.every=4", stop_at=2)
    (newest,) = (tmp_path / "stopped/checkpoints").iterdir()
    assert (tmp_path / "stopped" / NEWEST_FILE).read_text() == f"{newest}\n"
    shutil.rmtree(newest)
    assert main([str(tmp_path / "stopped")]) == 2
    newest = run / "checkpoints/step-00000003"
    assert (run / NEWEST_FILE).read_text() == f"{newest}\n"


def test_a_copied_link_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`cp -r` copies the link to a large disk: two runs would prune each other's checkpoints."""
    shutil.move(run / "checkpoints", run.parent / "disk")
    (run / "checkpoints").symlink_to(run.parent / "disk")
    assert main([str(run), "steps=4"]) == 0
    copy = run.parent / "copy"
    shutil.copytree(run, copy, symlinks=True)
    capsys.readouterr()
    assert main([str(copy), "steps=5"]) == 2
    error = capsys.readouterr().err
    assert f"where {run} keeps its checkpoints" in error and error.count("\n") == 1
    assert steps_in_file(copy) == [1, 2, 3, 4]
    assert main([str(run), "steps=5"]) == 0
    run.rename(run.with_name("renamed"))
    assert main([str(run.with_name("renamed")), "steps=6"]) == 0
    (copy / "checkpoints").unlink()
    shutil.copytree(run.parent / "disk", copy / "checkpoints")
    assert main([str(copy), "steps=7"]) == 0


def test_a_renamed_checkpoint_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be removed as one of a later step, which was undone."""
    (run / "checkpoints/step-00000003").rename(run / "checkpoints/step-00000009")
    assert main([str(run), "steps=5"]) == 2
    assert "step-00000009: is of step 3; restore the folder's name" in capsys.readouterr().err


def test_checkpoints_that_cannot_be_written_are_found_at_the_start(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first save would have failed after hours, and the last one lost the run."""
    (tmp_path / "file").mkdir()
    (tmp_path / "file/checkpoints").write_text("")
    (tmp_path / "link").mkdir()
    (tmp_path / "link/checkpoints").symlink_to("/proc/self")  # read-only for root as well
    for name in ("file", "link"):
        run = tmp_path / name
        assert main([str(tiny), f"run_dir={run}", "steps=1"]) == 2
        error = capsys.readouterr().err
        assert str(run / "checkpoints") in error and "cannot write" in error
        assert error.count("\n") == 1
        assert not (run / "metrics.jsonl").exists()


@pytest.mark.parametrize("damage", ["truncated", "empty"])
def test_a_complete_run_without_its_weights_is_not_complete(
    run: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that is queued again would end as a success."""
    last = run / "checkpoints/step-00000003"
    for path in last.glob("shard-*" if damage == "truncated" else "*"):
        path.write_bytes(path.read_bytes()[:100])
        if damage == "empty":
            path.unlink()
    assert main([str(run)]) == 2
    error = capsys.readouterr().err
    assert f"{last} is damaged: " in error and error.count("\n") == 1
    shutil.rmtree(last)
    assert main([str(run)]) == 0
    assert last.is_dir() and main([str(run)]) == 0
