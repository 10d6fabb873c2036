"""A run that begins with the weights of another one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainer.tiny import column, saved_tensors, train
from trainer.config import ConfigError

STILL = ["optim.learning_rate=1e-30", "router_bias_speed=0", "steps=1"]


@pytest.fixture(scope="module")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny, tmp_path_factory.mktemp("base") / "run", "seed=5", "steps=3").run_dir


def test_a_run_has_the_weights_of_the_other(base: Path, tiny: Path, tmp_path: Path) -> None:
    run = train(tiny, tmp_path / "run", *STILL, f"start_from={base}").run_dir
    before = saved_tensors(base / "checkpoints" / "step-00000003")
    after = saved_tensors(run / "checkpoints" / "step-00000001")
    names = [name for name in before if not name.startswith("optim.")]
    assert names and all(torch.equal(before[name], after[name]) for name in names)


def test_a_resume_does_not_start_again(base: Path, tiny: Path, tmp_path: Path) -> None:
    start = [f"start_from={base}", "steps=4"]
    straight = train(tiny, tmp_path / "straight", *start).run_dir
    train(tiny, tmp_path / "halves", *start, stop_at=2)
    train(tiny, tmp_path / "halves", *start)
    assert column(tmp_path / "halves", "loss") == column(straight, "loss")


def test_another_model(base: Path, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its model has moe_intermediate_size = 16, and"):
        train(tiny, tmp_path / "run", f"start_from={base}", "model.moe_intermediate_size=24")
