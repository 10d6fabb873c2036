"""What is saved and removed after a failure: the newest checkpoint is never a ruined one."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from tests.full_disk import full_disk
from tests.trainer.tiny import assert_same_run, steps_in_file, train
from trainer.checkpoint import store as checkpoint_store
from trainer.commands import main
from trainer.config import load_config
from trainer.export import export_run
from trainer.metrics.jsonl import read_events, read_metrics
from trainer.parallel.grid import Grid
from trainer.process.errors import DivergedError
from trainer.state import TrainState
from trainer.step import StepResult
from trainer.trainer import Trainer

EASY = "median_window: 2, min_history: 2, threshold: 1000"
CALM = ("stability.anticipatory_routing.when=never", "metrics.layer_stats_every=0")


def ruined(
    tiny: Path,
    run_dir: Path,
    at: int,
    *settings: str,
    before: Callable[[Trainer], None] | None = None,
) -> Trainer:
    """Returns a trainer whose update of step `at` ruins the weights, once."""
    trainer = Trainer(load_config(tiny, [f"run_dir={run_dir}", *CALM, *settings]), Grid.single())
    plain, faults = trainer.engine.step, [at]

    def step(learning_rate: float, norm: Tensor) -> None:
        plain(learning_rate, norm)
        if trainer.state.step + 1 in faults:
            faults.clear()
            if before is not None:
                before(trainer)
            for weight in trainer.model.parameters():
                weight.detach().fill_(float("nan"))

    trainer.engine.step = step  # type: ignore[method-assign]
    return trainer


def saved(run_dir: Path) -> list[int]:
    """The steps of the checkpoints."""
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*"))


def test_skipped_steps_neither_save_nor_remove(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("steps=20", "checkpoint={every: 2, keep: 1}", "optim.max_skipped_steps=4")
    with pytest.raises(DivergedError) as caught:
        ruined(tiny, tmp_path, 5, *settings).run()
    assert saved(tmp_path) == [4]
    newest = tmp_path / "checkpoints/step-00000004"
    assert "step 10: the loss is nan" in str(caught.value)
    assert f"from before step 6, the newest checkpoint is {newest};" in str(caught.value)
    assert "step 6: a checkpoint is due and not saved" in capsys.readouterr().out


def test_a_checkpoint_of_the_ruined_weights_replaces_none(tiny: Path, tmp_path: Path) -> None:
    """Saved right after the update, before any loss could show it."""
    settings = ("steps=20", "checkpoint={every: 2, keep: 1}")
    with pytest.raises(DivergedError) as caught:
        ruined(tiny, tmp_path, 4, *settings).run()
    assert saved(tmp_path) == [2, 4]
    folder = tmp_path / "checkpoints"
    assert (
        f"the newest checkpoint is {folder}/step-00000004 (saved right before it; the previous one "
        f"is {folder}/step-00000002);"
    ) in str(caught.value)


def test_old_checkpoints_go_once_the_newest_is_sound(tiny: Path, tmp_path: Path) -> None:
    folders: list[list[int]] = []
    checkpoint = "checkpoint={every: 2, keep: 1, mode: sync}"
    settings = [f"run_dir={tmp_path}", "steps=5", checkpoint, *CALM]
    trainer = Trainer(load_config(tiny, settings), Grid.single())
    trainer.periodic.append(lambda state, result: folders.append(saved(tmp_path)))
    trainer.run()
    assert folders == [[], [2], [2], [2, 4], [5]], "the loss after the last step was finite"


def test_a_validation_loss_that_is_not_finite_keeps_no_checkpoint(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("checkpoint={every: 1, keep: 1}", "evaluation.every=1")
    for name, steps in (("inside", 9), ("end", 4)):
        with pytest.raises(DivergedError) as caught:
            ruined(tiny, tmp_path / name, 4, f"steps={steps}", *settings).run()
        assert saved(tmp_path / name) == [3]
        assert f"checkpoint is {tmp_path / name / 'checkpoints/step-00000003'}" in str(caught.value)
    assert "step 4: the validation loss is nan, so its checkpoint is removed" in str(caught.value)
    assert "warning: step 4: the validation loss is nan" in capsys.readouterr().out
    records = read_metrics(tmp_path / "end/metrics.jsonl")
    assert records[-1]["validation_loss"] is None and records[-1]["loss"] is not None


@pytest.mark.parametrize("steps", [3, 6])
def test_an_evaluation_that_fails_loses_no_step(tiny: Path, tmp_path: Path, steps: int) -> None:
    """After step 3, in the middle of the run and at its end."""
    settings = (f"steps={steps}", "checkpoint={every: 3, keep: 1}", "evaluation.every=3")
    options = [f"run_dir={tmp_path / 'run'}", *CALM, *settings]
    trainer = Trainer(load_config(tiny, options), Grid.single())

    def evaluate(engine: object) -> None:
        raise OSError(5, "Input/output error", "validation.bin")

    assert trainer.evaluations.validation is not None
    trainer.evaluations.validation.evaluate = evaluate  # type: ignore[method-assign, assignment]
    with pytest.raises(OSError, match="Input/output error"):
        trainer.run()
    assert saved(tmp_path / "run") == [3]
    assert steps_in_file(tmp_path / "run") == [1, 2, 3]

    train(tiny, tmp_path / "run", *CALM, *settings, "steps=6")
    train(tiny, tmp_path / "plain", *CALM, *settings, "steps=6")
    assert steps_in_file(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    if steps == 6:
        assert_same_run(tmp_path / "plain", tmp_path / "run", 6)


def test_a_stop_while_steps_are_skipped_loses_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("steps=20", "checkpoint={every: 3, keep: 1}", "optim.max_skipped_steps=3")
    trainer = ruined(tiny, tmp_path, 4, *settings)

    def stop(state: TrainState, result: StepResult) -> None:
        if state.step == 5:
            trainer.stop.request()

    trainer.periodic.insert(0, stop)
    trainer.run()
    assert saved(tmp_path) == [3, 6]
    good, bad = (tmp_path / f"checkpoints/step-0000000{n}" for n in (3, 6))
    assert re.search(
        f"warning: {bad} was saved without an update.* newest checkpoint is {good};.* remove "
        f"{bad.name}",
        capsys.readouterr().out,
    )
    advice = f"before step 5, .* is {good}; to .* remove {bad.name}"
    with pytest.raises(DivergedError, match=advice):
        train(tiny, tmp_path, *CALM, *settings)
    assert saved(tmp_path) == [3, 6]
    capsys.readouterr()

    assert main(["eval", str(tmp_path)]) == 0, "of the newest, and with a warning"
    output = capsys.readouterr()
    assert json.loads(output.out.splitlines()[-1])["validation_loss"] is None
    doubt = "the steps from 5 to 6 were skipped"
    assert output.err.startswith(f"warning: {doubt}")
    exported = export_run(load_config(tmp_path / "config.yaml"), tmp_path / "hf")
    assert f"{tmp_path / 'hf'}; {doubt}" in exported

    checkpoint_store.remove_folder(bad)
    train(tiny, tmp_path, *CALM, *settings, "steps=6")
    assert saved(tmp_path) == [6]


@pytest.mark.parametrize("source", ["snapshot", "checkpoint"])
def test_a_rollback_goes_to_before_the_ruinous_update(
    tiny: Path, tmp_path: Path, source: str
) -> None:
    """Steps 7, 8 and 9 are skipped; what was copied or saved after step 6 is ruined."""
    every = 2 if source == "snapshot" else 0
    spikes = f"stability.spikes={{{EASY}, snapshot_every: {every}, min_rollback_steps: 1}}"
    settings = ("steps=12", "checkpoint={every: 2, keep: 0}", "optim.max_skipped_steps=2")
    ruined(tiny, tmp_path / "run", 6, spikes, *settings).run()
    (event,) = [event for _, event in read_events(tmp_path / "run/metrics.jsonl")]
    assert (event["spike_step"], event["restored_step"]) == (9, 4)
    train(tiny, tmp_path / "plain", *CALM, *settings)
    assert_same_run(tmp_path / "plain", tmp_path / "run", 12)
    assert_same_run(tmp_path / "plain", tmp_path / "run", 6)


def test_a_run_that_cannot_roll_back_does_not_save_ruined_weights(
    tiny: Path, tmp_path: Path
) -> None:
    bare = f"stability.spikes={{{EASY}, snapshot_every: 0}}"
    settings = ("steps=12", "checkpoint={every: 2, keep: 1}", "optim.max_skipped_steps=2")
    with pytest.raises(DivergedError, match=r"nothing is saved; .*checkpoint is .*step-0+2 \("):
        ruined(tiny, tmp_path, 2, bare, *settings).run()
    assert saved(tmp_path) == [2]


def test_a_full_disk_does_not_end_a_rollback(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint that was undone stays until it can be replaced."""
    spikes = f"stability.spikes={{{EASY}, snapshot_every: 3, min_rollback_steps: 1}}"
    settings = ("steps=12", "checkpoint={every: 5, keep: 0}", "optim.max_skipped_steps=0")
    trainer = ruined(tiny, tmp_path / "run", 5, spikes, *settings)
    plain = trainer.stability.roll_back

    def roll_back(problem: str) -> object:
        with full_disk(1000):
            return plain(problem)

    trainer.stability.roll_back = roll_back  # type: ignore[method-assign, assignment]
    trainer.run()
    assert "the checkpoint could not be written: File too large" in capsys.readouterr().out
    assert saved(tmp_path / "run") == [5, 10, 12]
    train(tiny, tmp_path / "plain", *CALM, *settings)
    assert_same_run(tmp_path / "plain", tmp_path / "run", 5)


def test_a_checkpoint_that_cannot_be_removed_is_a_warning(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = checkpoint_store.remove_folder

    def remove_folder(folder: Path) -> None:
        if folder.exists():
            raise OSError(16, "Device or resource busy")
        plain(folder)

    monkeypatch.setattr(checkpoint_store, "remove_folder", remove_folder)
    train(tiny, tmp_path, "steps=3", "checkpoint={every: 1, keep: 1}")
    assert saved(tmp_path) == [1, 2, 3]
    assert "step-00000001: could not be removed: Device or resource busy" in capsys.readouterr().out


def test_what_a_killed_save_left_goes_with_the_next(tiny: Path, tmp_path: Path) -> None:
    for name in (".step-00000007.tmp", ".step-00000003.removed"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "shard.safetensors").write_bytes(b"x" * 100)
    train(tiny, tmp_path, "steps=1")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_state_of_before_knows_where_skipping_began() -> None:
    state = TrainState()
    state.restore({"step": 9, "consecutive_skips": 2})
    assert state.skipping_since == 7


@pytest.mark.slow
def test_a_run_imports_nothing_after_its_first_step(tiny: Path, tmp_path: Path) -> None:
    """So no save fails for a file system or memory that has gone since."""
    code = """
import sys
import torch
from trainer.config import load_run
from trainer.parallel.grid import open_grid
from trainer.trainer import Trainer
config = load_run(sys.argv[1], sys.argv[2:])
modules = []
with open_grid(torch.device("cpu"), config.degrees) as grid:
    trainer = Trainer(config, grid)
    trainer.periodic.insert(0, lambda state, result: modules.append(set(sys.modules)))
    trainer.run()
print(sorted(set(sys.modules) - modules[0]))
"""
    overrides = [f"run_dir={tmp_path}", "steps=2", "checkpoint.every=1"]
    command = [sys.executable, "-c", code, str(tiny), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = ast.literal_eval(done.stdout.splitlines()[-1])
    assert [name for name in modules if not name.startswith("numpy.")] == []
