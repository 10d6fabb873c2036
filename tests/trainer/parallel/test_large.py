"""All axes at once, on as many processes as that takes: `make test-large`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.parallel.close_calls import recorded_gaps
from tests.trainer.parallel.topologies import (
    Job,
    assert_trains_like,
    outcome,
    run_all,
    topology,
)

# More rows than the other tests, and so a seed of their own with which no choice is close.
ROWS = ("data.global_batch_size=8", "seed=47")
ALL_AT_TWO = {"tensor": 2, "context": 2, "pipeline": 2, "expert": 2}
SPREADS = [
    # What remains is data 2; the experts are over 2 of a stage's 8 ranks.
    topology(16, **ALL_AT_TWO),
    topology(16, "parallel.recompute=[block]", pipeline_schedule="zero_bubble_v", **ALL_AT_TWO),
    # Data 4, and each expert split as well.
    topology(32, expert_tensor=2, **ALL_AT_TWO),
]


@pytest.mark.large
@pytest.mark.timeout(3600)
def test_all_axes_train_like_one_rank(tiny: Path, tmp_path: Path) -> None:
    alone = topology(1)
    with recorded_gaps() as gaps:
        run_all(tiny, [Job(alone, tmp_path / alone.name)], *ROWS)
    assert gaps.router > 1e-5 and gaps.index > 1e-5, vars(gaps)
    run_all(tiny, [Job(spread, tmp_path / spread.name) for spread in SPREADS], *ROWS)
    reference = outcome(tmp_path / alone.name)
    for spread in SPREADS:
        assert_trains_like(reference, outcome(tmp_path / spread.name), spread.name)
