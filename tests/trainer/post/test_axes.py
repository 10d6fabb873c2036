"""Own samples, and training on them, are the same on any ranks, up to rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed import spawn
from tests.trainer.post.reinforce import reinforcement
from tests.trainer.tiny import column, train

DEGREES = {
    "data": [],
    "tensor": ["parallel.tensor=2"],
    "expert": ["parallel.expert=2"],
    "context": ["parallel.context=2"],
    "pipeline": ["parallel.pipeline=2", "parallel.pipeline_schedule=1f1b"],
}
STEPS = ["steps=2", "optim.learning_rate=1e-3", "data.micro_batch_size=1"]


def train_on_rank(rank: int, world_size: int, path: Path, folder: Path, jobs: list[str]) -> None:
    for name in jobs:
        overrides = reinforcement(folder)
        train(path, folder / name, *STEPS, *DEGREES[name], *overrides)


def samples(run_dir: Path, step: int) -> list[tuple[list[int], list[float]]]:
    lines = (run_dir / "rollouts" / f"step-{step:08d}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(record["ids"], record["log_probabilities"]) for record in records]


def assert_alike(one: Path, other: Path) -> None:
    for step in (0, 1):
        for (ids, log_p), (other_ids, other_log_p) in zip(
            samples(one, step), samples(other, step), strict=True
        ):
            assert ids == other_ids
            assert log_p == pytest.approx(other_log_p, abs=1e-5)
    for name in ("loss", "grad_norm", "tokens"):
        assert column(one, name) == pytest.approx(column(other, name), rel=1e-4, abs=1e-7), name
    for ours, theirs in zip(column(one, "post"), column(other, "post"), strict=True):
        for name in ("score/words", "length/words", "entropy", "clipped_share"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
        assert theirs["log_p_gap_max"] < 1e-4


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    return train(tiny, folder / "run", *STEPS, *reinforcement(folder)).run_dir


@pytest.mark.slow
def test_two_ranks(alone: Path, tiny: Path, tmp_path: Path) -> None:
    """Data ranks divide the samples but with experts on each other; a pipeline has no cache."""
    spawn(train_on_rank, 2, tiny, tmp_path, list(DEGREES), timeout=240.0)
    for name in DEGREES:
        assert_alike(alone, tmp_path / name)
