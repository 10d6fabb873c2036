"""A run on four processes whose degrees change from phase to phase, and the same run on one set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import spawn
from tests.trainer.config.test_recipe import phased
from tests.trainer.parallel.topologies import MODEL
from tests.trainer.test_phase_runs import BORDERS, COMMON, STAGES, STEPS
from tests.trainer.tiny import column, crash, steps_in_file
from trainer.checkpoint import checkpoints_in, step_of
from trainer.config import load_config
from trainer.parallel.grid import Grid
from trainer.process.signals import StopRequest
from trainer.trainer import Trainer

# A pipeline on one side of two borders; at all of them other ranks own the optimizer's states.
DEGREES: list[dict[str, Any]] = [
    {"tensor": 2, "expert": 2},
    {"context": 2, "recompute": ["block"]},
    {"tensor": 2, "pipeline": 2},
    {"tensor": 2, "expert": 4},
    {"context": 4, "expert_tensor": 2},
]
RUN = (
    *MODEL,
    *COMMON,
    "steps=0",
    "checkpoint.every=2",
    "data.micro_batch_size=1",
    "model.index_topk=3",
    "seed=40",
)
Point = tuple[str, int]
"""Where a run dies: `before` the save after a step, `in` it, or `after` it."""


def with_degrees(tiny: Path, folder: Path) -> Path:
    stages = [stage | {"parallel": own} for stage, own in zip(STAGES, DEGREES, strict=True)]
    return phased(tiny, folder, stages)


def train_on(
    rank: int, world: int, path: Path, run_dir: Path, more: tuple[str, ...], deaths: list[Point]
) -> list[int]:
    """Worker: trains to the end, as processes that are started again; returns where each began.

    It dies once at every point of `deaths`, in their order.
    """
    deaths, begins = list(deaths), []
    while True:
        config = load_config(path, [*RUN, *more, f"run_dir={run_dir}"])
        saved = checkpoints_in(run_dir / "checkpoints")
        config = config.at_step(step_of(saved[-1]) if saved else 0)
        stop = StopRequest()
        trainer = Trainer(config, Grid.build(config.degrees(world), torch.device("cpu")), stop)
        if deaths:
            die_at(trainer, *deaths[0])
        dist.barrier()
        begins.append(config.segment.number)
        try:
            state = trainer.run()
        except RuntimeError as error:
            assert "crash" in str(error)
            deaths.pop(0)
            continue
        if deaths and deaths[0] == ("after", state.step):
            deaths.pop(0)
        elif not state.starts_again:
            assert not deaths
            return begins


def die_at(trainer: Trainer, when: str, step: int) -> None:
    if when == "before":
        trainer.periodic.insert(1, lambda state, _: crash(state.step == step))
    folder = trainer.checkpoint.folder
    publish: Callable[..., None] = folder._publish
    if when == "in":

        def publish_or_die(temporary: Path, target: Path, *others: Any) -> None:
            crash(step_of(target) == step)
            publish(temporary, target, *others)

        folder._publish = publish_or_die  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def one_set(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on two tensor and two data ranks throughout."""
    folder = tmp_path_factory.mktemp("one_set")
    path, more = phased(tiny, folder, STAGES), ("parallel.tensor=2",)
    spawn(train_on, 4, path, folder / "run", more, [], timeout=300)
    return folder / "run"


def assert_same_losses(one: Path, other: Path) -> None:
    assert steps_in_file(other) == list(range(1, STEPS + 1))
    for name in ("loss", "lm_loss", "mtp_loss", "indexer_loss"):
        ours, theirs = column(one, name), column(other, name)
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-9), name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_border_changes_the_degrees_and_no_loss(
    tiny: Path, one_set: Path, tmp_path: Path
) -> None:
    """Killed before, in and after the save at every border."""
    deaths: list[Point] = [(when, step) for step in BORDERS for when in ("before", "in", "after")]
    path = with_degrees(tiny, tmp_path)
    begins = spawn(train_on, 4, path, tmp_path / "run", (), deaths, timeout=500)
    assert begins == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]] * 4
    assert_same_losses(one_set, tmp_path / "run")
