"""The indexers' objective and everybody's gradients at two ranks of each axis, as on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.config import AttentionMode
from tests.distributed import spawn
from tests.trainer.parallel.test_gradients import (
    CONFIG,
    ROW,
    Result,
    batches_of,
    covered_by,
    gradients_of,
    leave_special_values,
    limits_of,
    nudge,
    whole_of,
    zero_of,
)
from trainer.engine import NativeEngine, learns
from trainer.parallel.degrees import Degrees
from trainer.parallel.grid import Grid
from trainer.parallel.plan import build_local_model
from trainer.parallel.stage_plan import plan_stages

# Few selected entries of up to twelve; two layers of four have an indexer, both on the first stage.
MODEL = CONFIG.model_copy(update={"index_topk": 3})
LAYOUTS = ("samples across all ranks", "padding on some ranks only")
Spread = dict[str, Any]
MODES: tuple[AttentionMode, ...] = ("warmup", "sparse", "dense")
AXES: list[Spread] = [
    {},
    *({axis: 2} for axis in ("tensor", "context", "expert", "pipeline")),
]
MORE: list[Spread] = [
    *(
        {"pipeline": 2, "schedule": name}
        for name in ("interleaved_1f1b", "zero_bubble_v", "dual_pipe_v")
    ),
    {"tensor": 2, "recompute": ("attention", "streams", "norms")},
    {"recompute": ("block",)},
]
Results = list[Result]


def step(grid: Grid, spread: Spread, layout: str, mode: AttentionMode, seed: int = 0) -> Result:
    """Losses, and the gradient of every parameter that learns with where it lies in the whole."""
    schedule = spread.get("schedule", "1f1b")
    chunks = 1 if schedule == "1f1b" else 2
    stages = plan_stages(MODEL, ROW, grid.pipeline.size, schedule, chunks)
    local = build_local_model(MODEL, torch.float32, grid, stages, spread.get("recompute", ()))
    local.model.to_empty(device="cpu")
    local.model.init_weights(seed=5, shards=local.placements)
    leave_special_values(local)
    nudge(local, seed)
    optimizer = zero_of(MODEL, local, grid)
    engine = NativeEngine(local, grid, optimizer)
    engine.set_attention(mode)
    batches = [*batches_of(layout, grid.data.rank, grid.data.size)]
    if grid.data.size == 1:  # as many as the schedules want
        batches = batches * 2
    else:
        batches = batches_of(layout, 0, 1)
    out = engine.forward_backward(batches)
    losses = [float(x) for x in (out.loss, out.lm, out.balance, out.indexer)]
    losses.append(float(engine.gradient_norm()))
    for name, parameter in local.model.named_parameters():
        assert parameter.requires_grad == learns(name, mode)
        assert (parameter.grad is not None) == parameter.requires_grad, name
    return losses, gradients_of(optimizer, local)


def run_cases(rank: int, world: int, spread: Spread) -> Results:
    """Worker: every case at a topology."""
    degrees = {k: v for k, v in spread.items() if k not in ("schedule", "recompute")}
    grid = Grid.build(Degrees(world, **degrees), torch.device("cpu"))
    return [step(grid, spread, layout, mode) for layout in LAYOUTS for mode in MODES]


@pytest.fixture(scope="module")
def alone() -> list[Results]:
    """Every case on one rank, and twice more from weights that rounding could have left."""
    grid = Grid.single(torch.device("cpu"))
    cases = [(layout, mode) for layout in LAYOUTS for mode in MODES]
    return [[step(grid, {}, *case, seed) for case in cases] for seed in range(3)]


@pytest.mark.parametrize(
    "spread", [*AXES, *(pytest.param(spread, marks=pytest.mark.slow) for spread in MORE)], ids=str
)
def test_two_ranks_of_every_axis_are_one(alone: list[Results], spread: Spread) -> None:
    """Losses, norm and gradients; a norm is a root of sums of squares in another order."""
    by_rank = spawn(run_cases, 2, spread)
    ours, *nudged = alone
    for number, (losses, whole) in enumerate(ours):
        mode = MODES[number % len(MODES)]
        assert (losses[3] > 0.01) == (mode != "dense")
        reference = whole_of(whole)
        limits = limits_of(reference, [whole_of(other[number][1]) for other in nudged])
        covered = dict.fromkeys(reference, 0)
        for results in by_rank:
            theirs, parts = results[number]
            assert theirs == pytest.approx(losses, rel=3e-6), number
            for name, count in covered_by(parts, reference, limits).items():
                covered[name] += count
        assert all(covered[name] >= grad.numel() for name, grad in reference.items())
