"""Steps without finite numbers: no update, counted, logged, and the end after too many."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config import load_config
from trainer.engine import NativeEngine, StepLosses
from trainer.metrics.jsonl import read_metrics
from trainer.parallel.grid import Grid
from trainer.process.errors import DivergedError
from trainer.trainer import Trainer


def run(tiny: Path, folder: Path, poisoned: set[int], *settings: str) -> Trainer:
    """Train with a NaN in two gradients at the calls of `poisoned`, counted from 1."""
    config = load_config(tiny, [f"run_dir={folder}", "checkpoint.every=1", *settings])
    trainer = Trainer(config, Grid.single())
    trainer.checkpoint.load(trainer.state)  # as run() does, for the numbers of the steps
    engine: NativeEngine = trainer.engine
    plain = engine.forward_backward
    reduce = trainer.optimizer.reduce
    weights: list[dict[str, torch.Tensor]] = []

    def forward_backward(*arguments: Any) -> StepLosses:
        weights.append({n: t.clone() for n, t in trainer.model.state_dict().items()})
        return plain(*arguments)

    def poison() -> None:
        if trainer.state.step + 1 in poisoned:
            for name in ("norm.weight", "layers.1.attn.wkv.weight"):
                dict(trainer.model.named_parameters())[name].grad[0] = float("nan")
        reduce()

    engine.forward_backward = forward_backward  # type: ignore[method-assign]
    trainer.optimizer.reduce = poison  # type: ignore[method-assign]
    trainer.weights = weights  # type: ignore[attr-defined]
    trainer.run()
    return trainer


def test_a_skipped_step_changes_nothing_and_is_told(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = run(tiny, tmp_path, {2}, "steps=3")
    first, second, third = trainer.weights  # type: ignore[attr-defined]
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(second[name], third[name]) for name in second)
    assert trainer.optimizer.step_count == 2 and trainer.state.step == 3
    output = capsys.readouterr().out.replace(str(tmp_path), "")
    lines = [line for line in output.splitlines() if "skipped" in line]
    assert len(lines) == 1 and "step 2:" in lines[0] and "'layers.1.attn.wkv.weight'" in lines[0]
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["skipped_steps"] for record in records] == [0, 1, 1]
    assert records[1]["grad_norm"] is None and "NaN" not in json.dumps(records)


def test_stats_of_ruined_weights_are_null(tiny: Path, tmp_path: Path) -> None:
    """The step is skipped, and its stats of layers are what they are."""
    settings = [f"run_dir={tmp_path}", "steps=2", "metrics.layer_stats_every=1"]
    trainer = Trainer(load_config(tiny, [*settings, "optim.max_skipped_steps=9"]), Grid.single())
    trainer.evaluations.validation = None
    for weight in trainer.model.parameters():
        weight.detach().fill_(float("nan"))
    trainer.run()
    first, _ = read_metrics(tmp_path / "metrics.jsonl")
    assert first["loss"] is None and first["layers"]["sink_max"] == [None] * 4
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_too_many_in_a_row_end_the_run_and_a_resume_goes_on_counting(
    tiny: Path, tmp_path: Path
) -> None:
    most = "optim.max_skipped_steps=2"
    assert run(tiny, tmp_path / "a", {1, 2, 4, 5}, "steps=6", most).state.skipped_steps == 4
    run(tiny, tmp_path / "b", {2, 3}, "steps=3", most)
    with pytest.raises(DivergedError, match=r"step 4:.*layers\.1.*= 2 in a row.*checkpoint is"):
        run(tiny, tmp_path / "b", {4}, "steps=6", most)
