"""Own samples, and training on them, are the same on any ranks, up to rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed import spawn
from tests.trainer.post.reinforce import distillation, reinforcement
from tests.trainer.tiny import column, train

DEGREES = {
    "data": [],
    "tensor": ["parallel.tensor=2"],
    "expert": ["parallel.expert=2"],
    "context": ["parallel.context=2"],
    "pipeline": ["parallel.pipeline=2", "parallel.pipeline_schedule=1f1b"],
}
STEPS = ["steps=2", "optim.learning_rate=1e-3", "data.micro_batch_size=1"]


def train_on_rank(
    rank: int, world_size: int, path: Path, folder: Path, jobs: list[str], post: list[str]
) -> None:
    for name in jobs:
        train(path, folder / name, *STEPS, *DEGREES[name], *post)


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
        assert ours.keys() == theirs.keys()
        for name in ours:
            if "second" not in name and "gap" not in name:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
        assert theirs["log_p_gap_max"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["reinforce", "distil"])
def test_two_ranks(tiny: Path, tmp_path: Path, method: str) -> None:
    """Data ranks divide the samples but with experts on each other; a pipeline has no cache."""
    post = reinforcement(tmp_path)
    if method == "distil":
        for seed in (5, 6):
            train(tiny, tmp_path / f"teacher{seed}", f"seed={seed}", "steps=2")
        post = distillation(tmp_path, [str(tmp_path / f"teacher{seed}") for seed in (5, 6)])
    alone = train(tiny, tmp_path / "alone", *STEPS, *post).run_dir
    spawn(train_on_rank, 2, tiny, tmp_path, list(DEGREES), post, timeout=240.0)
    for name in DEGREES:
        assert_alike(alone, tmp_path / name)
