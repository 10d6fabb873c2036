"""TensorBoard's event files: the numbers of metrics.jsonl, also after a resume."""

import errno
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer.tiny import column, train
from trainer import preflight as checks
from trainer.config import load_config
from trainer.metrics.tensorboard_log import TensorBoardLog
from trainer.parallel.grid import Grid
from trainer.process.errors import PreflightError


def scalars(run_dir: Path, name: str) -> dict[int, float]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def test_the_curves_are_those_of_the_metrics(tiny: Path, tmp_path: Path) -> None:
    settings = ("metrics.tensorboard=true", "evaluation.every=3", "checkpoint.every=2")
    with pytest.raises(RuntimeError, match="crash"):
        train(tiny, tmp_path, *settings, crash_at=4)
    train(tiny, tmp_path, *settings)  # from step 2
    losses = scalars(tmp_path, "lm_loss")
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert list(losses.values()) == pytest.approx(column(tmp_path, "lm_loss"), rel=1e-6)
    assert list(scalars(tmp_path, "validation_bits_per_byte")) == [3, 6]
    assert list(scalars(tmp_path, "layers/expert_load_max/00")) == [6]


def test_a_missing_package_is_one_sentence(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "tensorboard_is_installed", lambda: False)
    config = load_config(tiny, [f"run_dir={tmp_path}", "metrics.tensorboard=true"])
    with pytest.raises(PreflightError, match=r"pip install 'v4-pretrain\[tensorboard\]'"):
        checks.preflight(config, Grid.single())


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    log = TensorBoardLog(tmp_path, 0, lines.append)
    assert log._writer is not None

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log._writer, "add_scalar", full)
    for step in (1, 2):
        log.log({"step": step, "loss": 1.0})
    log.close()
    assert lines == ["warning: tensorboard: No space left on device; it does not log from here on"]
