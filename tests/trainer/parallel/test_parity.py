"""Any division of model, tokens and experts trains like one rank, and resumes as any other.

Every run has packed rows of several samples, every kind of layer, hash and learned routers and the
MTP block, in fp32.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.parallel.close_calls import recorded_gaps
from tests.trainer.parallel.topologies import (
    Job,
    Outcome,
    Topology,
    assert_trains_like,
    outcome,
    run_all,
    topology,
)
from tests.trainer.tiny import column

ALONE = topology(1)
SCHEDULES = ("1f1b", "interleaved_1f1b", "zero_bubble_v", "dual_pipe_v")
RECOMPUTE = "parallel.recompute=[streams, norms, attention]"
TOPOLOGIES = [
    topology(2),
    topology(2, tensor=2),
    topology(2, context=2),
    topology(2, expert=2),
    topology(2, expert_tensor=2),
    *[topology(2, pipeline=2, pipeline_schedule=name) for name in SCHEDULES],
    topology(2, "parallel.pipeline_layers_per_stage=[3, 1]", RECOMPUTE, pipeline=2),
    # Expert ranks are data ranks here: pipeline 2 x data 2, the experts over the latter.
    topology(4, pipeline=2, expert=2),
    topology(4, tensor=2, expert=2),
]
LARGER = [
    topology(4),
    topology(4, tensor=4),
    topology(4, context=4),
    topology(4, expert=4),
    topology(4, pipeline=4),
    topology(4, tensor=2, pipeline=2),
    topology(4, tensor=2, context=2),
    topology(4, context=2, expert=4),
    topology(4, RECOMPUTE, tensor=2, expert=2, expert_tensor=2),
    topology(4, pipeline=2, expert=2, pipeline_schedule="zero_bubble_v"),
    topology(4, pipeline=2, context=2, pipeline_schedule="dual_pipe_v"),
]

BF16_RUN = ("precision=bf16", "seed=3", "model.initializer_range=0.05")
BF16 = [ALONE, topology(4, tensor=2, pipeline=2, expert=2)]

SAVED_AFTER, GOES_ON_TO = 5, 7
MOVES = [
    (ALONE, topology(2, tensor=2)),
    (topology(2, context=2), topology(2, pipeline=2)),
]
LARGER_MOVES = [
    (topology(2, tensor=2), topology(2, expert=2)),
    (topology(2, pipeline=2, pipeline_schedule="zero_bubble_v"), topology(4, tensor=2, expert=2)),
    (topology(4, tensor=2, expert_tensor=2), ALONE),
    (topology(4, expert=4), topology(4, context=4)),
    (topology(4, pipeline=2, tensor=2), topology(2, expert_tensor=2)),
    (topology(2), topology(4, tensor=2, context=2)),
]


@pytest.fixture(scope="module")
def alone_dir(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one rank."""
    run_dir = tmp_path_factory.mktemp("parity") / "alone"
    with recorded_gaps() as gaps:
        run_all(tiny, [Job(ALONE, run_dir)])
    # A hundred times what rounding moves: see close_calls.py. If not, take another seed.
    assert gaps.router > 1e-5 and gaps.index > 1e-5, vars(gaps)
    return run_dir


@pytest.fixture(scope="module")
def alone(alone_dir: Path) -> Outcome:
    return outcome(alone_dir)


@pytest.mark.parametrize(
    "spread",
    [*TOPOLOGIES, *(pytest.param(spread, marks=pytest.mark.slow) for spread in LARGER)],
    ids=lambda spread: spread.name,
)
def test_trains_like_one_rank(tiny: Path, alone: Outcome, tmp_path: Path, spread: Topology) -> None:
    run_all(tiny, [Job(spread, tmp_path)])
    assert_trains_like(alone, outcome(tmp_path), spread.name)


@pytest.mark.parametrize(
    ("before", "after"),
    [*MOVES, *(pytest.param(*move, marks=pytest.mark.slow) for move in LARGER_MOVES)],
    ids=lambda spread: spread.name,
)
def test_a_checkpoint_resumes_at_another_topology(
    tiny: Path, alone_dir: Path, tmp_path: Path, before: Topology, after: Topology
) -> None:
    """Losses of the steps after the move are those of the run that was never moved."""
    run_all(tiny, [Job(before, tmp_path, SAVED_AFTER)])
    run_all(tiny, [Job(after, tmp_path, GOES_ON_TO)])
    straight = column(alone_dir, "loss")[:GOES_ON_TO]
    moved = column(tmp_path, "loss")
    assert len(moved) == GOES_ON_TO
    assert moved[SAVED_AFTER:] == pytest.approx(straight[SAVED_AFTER:], rel=1e-6)


@pytest.mark.slow
def test_bf16_follows_one_rank_as_far_as_its_rounding_allows(tiny: Path, tmp_path: Path) -> None:
    """Partial sums are rounded to 8 bits before they are added, and close choices fall otherwise:
    2e-4 was seen. A part that is missing or counted twice shows in the first digits."""
    run_all(tiny, [Job(t, tmp_path / t.name) for t in BF16], *BF16_RUN)
    alone, spread = (column(tmp_path / t.name, "loss") for t in BF16)
    assert spread == pytest.approx(alone, rel=2e-3)
