"""A run that was interrupted ends exactly like one that was not."""

from pathlib import Path

import pytest
import torch

from tests.trainer.tiny import (
    assert_same_run,
    column,
    saved_tensors,
    steps_in_file,
    train,
)
from trainer.__main__ import main
from trainer.config import load_config


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twenty_steps_are_ten_and_ten(tiny: Path, tmp_path: Path, precision: str) -> None:
    common = ["steps=20", f"precision={precision}"]
    train(tiny, tmp_path / "straight", *common)
    train(tiny, tmp_path / "halves", *common, stop_at=10)
    assert column(tmp_path / "halves", "step")[-1] == 10
    train(tiny, tmp_path / "halves", *common)
    assert_same_run(tmp_path / "straight", tmp_path / "halves", 20)


def test_twenty_steps_are_ten_and_ten_on_two_ranks(on_two_ranks: Path) -> None:
    assert (on_two_ranks / "halves/checkpoints/step-00000010").is_dir()
    assert_same_run(on_two_ranks / "straight", on_two_ranks / "halves", 20)


def test_a_checkpoint_of_two_ranks_opens_on_one(
    tiny: Path, on_two_ranks: Path, tmp_path: Path
) -> None:
    run = on_two_ranks / "moved"
    files = list((run / "checkpoints/step-00000003").glob("*.safetensors"))
    assert len(files) == 2
    train(tiny, run, "steps=5")
    train(tiny, tmp_path / "alone", "steps=5")
    assert column(run, "loss") == pytest.approx(column(tmp_path / "alone", "loss"), rel=1e-5)


def test_bf16_keeps_masters_and_gives_back_their_rounding(tiny: Path, tmp_path: Path) -> None:
    from tests.trainer.tiny import StopRequest, Trainer
    from trainer.parallel.grid import Grid

    config = train(tiny, tmp_path / "run", "steps=2", "precision=bf16")
    saved = saved_tensors(config.run_dir / "checkpoints/step-00000002")
    name = "layers.0.attn.wq_a.weight"
    assert str(saved[name].dtype) == "torch.float32"
    assert not saved[name].equal(saved[name].bfloat16().float()), "the master was rounded"
    trainer = Trainer(config, Grid.single(), StopRequest())
    trainer.checkpoint.load(trainer.state)
    weights = trainer.model.state_dict()
    assert weights[name].equal(saved[name].bfloat16())
    assert str(weights["layers.0.hc_attn.fn"].dtype) == "torch.float32"


def test_a_crash_leaves_one_object_a_step(tiny: Path, tmp_path: Path) -> None:
    common = ["steps=8", "checkpoint.every=3"]
    with pytest.raises(RuntimeError, match="crash"):
        train(tiny, tmp_path / "run", *common, crash_at=5)
    assert steps_in_file(tmp_path / "run")[-1] == 5
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # what a power cut may leave
    train(tiny, tmp_path / "run", *common)
    assert steps_in_file(tmp_path / "run") == list(range(1, 9))
    train(tiny, tmp_path / "straight", *common)
    assert_same_run(tmp_path / "straight", tmp_path / "run", 8)


def test_deterministic_is_the_switch_of_torch(tiny: Path, tmp_path: Path) -> None:
    try:
        for deterministic in (False, True):
            name = str(deterministic).lower()
            settings = [f"run_dir={tmp_path / name}", "steps=1", "evaluation.max_rows=1"]
            assert main([str(tiny), *settings, f"deterministic={name}"]) == 0
            assert torch.are_deterministic_algorithms_enabled() == deterministic
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_resolved_config_resumes_the_run(tiny: Path, tmp_path: Path) -> None:
    config = train(tiny, tmp_path / "run", "steps=2", "optim.adamw.eps=1e-20")
    again = load_config(config.run_dir / "config.yaml")
    assert again == config and again.optim.adamw.eps == 1e-20
    train(config.run_dir / "config.yaml", config.run_dir, "steps=4")
    assert steps_in_file(config.run_dir) == [1, 2, 3, 4]
