"""A run of the real Trainer on a fake GPU, and what is allowed in each part of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.fake_gpu import Report, run
from tests.fake_gpu.guard import missing

needs_compiler = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SIZES = (
    # Every kernel takes these sizes; what has only a shape costs nothing.
    "precision=bf16",
    "kernels=triton",
    "model.num_attention_heads=4",
    "model.head_dim=64",
    "model.o_groups=4",
    "model.index_n_heads=16",
    "model.index_head_dim=16",
    "model.n_routed_experts=8",
    "model.moe_intermediate_size=32",
    "model.hc_mult=4",
    "data.global_batch_size=2",
    "data.micro_batch_size=1",
    "evaluation.max_rows=2",
    "steps=2",
)


def phases(tokens: int) -> tuple[str, ...]:
    """Three phases of a step each, of as many tokens."""
    modes = enumerate(("dense", "warmup", "sparse"), 1)
    each = [f"{{until_tokens: {tokens * n}, attention: {mode}}}" for n, mode in modes]
    return "steps=0", f"phases=[{', '.join(each)}]", "optim.schedule.decay_fraction=0.3"


ANTICIPATION = ("stability.anticipatory_routing={when: always, lag_steps: 1}",)
OFFLOAD = ("parallel.recompute=[block]", "parallel.offload=[block]")


@dataclass
class Parts:
    """Reports of the parts of a run.

    Attributes:
        steps: of each step; the last also collects the stats of the layers.
        build, evaluation, save: of what their names say.
        rest: of all else.
    """

    build: Report = field(default_factory=Report)
    steps: list[Report] = field(default_factory=list)
    evaluation: Report = field(default_factory=Report)
    save: Report = field(default_factory=Report)
    rest: Report = field(default_factory=Report)


def checkpoint_of_one_rank() -> Any:
    """This rank writes everything that it holds; what other ranks hold does not exist."""
    from trainer.checkpoint import layout

    def write_own(held: list[list[tuple[str, Any, int]]]) -> dict[Any, int]:
        return {(name, offset): 0 for name, offset, _ in held[0]}

    return patch.object(layout, "divide_writes", write_own)


def train(gpu: Any, path: Path, run_dir: Path, overrides: Sequence[str], saves: bool) -> Parts:
    """Trains in the process of the fake GPU."""
    import torch
    import torch.distributed as dist

    from trainer.config import load_config
    from trainer.parallel.grid import Grid
    from trainer.trainer import Trainer

    config = load_config(path, [f"run_dir={run_dir}", *SIZES, *overrides])
    world = dist.get_world_size() if dist.is_initialized() else 1
    parts = Parts()
    with gpu.reporting(parts.build):
        grid = Grid.build(config.degrees(world), torch.device("cuda", 0))
        trainer = Trainer(config, grid)

    def reported(call: Callable[..., Any], report: Callable[[], Report]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with gpu.reporting(report()):
                return call(*args, **kwargs)

        return wrapped

    def new_step() -> Report:
        parts.steps.append(Report())
        return parts.steps[-1]

    assert trainer.evaluations.validation is not None
    save = trainer.checkpoint.save if saves else lambda state: run_dir
    with (
        gpu.reporting(parts.rest),
        patch.object(trainer, "step", reported(trainer.step, new_step)),
        patch.object(
            trainer.evaluations.validation,
            "evaluate",
            reported(trainer.evaluations.validation.evaluate, lambda: parts.evaluation),
        ),
        patch.object(trainer.checkpoint, "save", reported(save, lambda: parts.save)),
        even_counts(),
        checkpoint_of_one_rank(),
    ):
        trainer.run()
    return parts


def variants(gpu: Any, path: Path, packings: int, overrides: Sequence[str]) -> list[int]:
    """How many variants of Triton kernels there are after each of as many random packings."""
    import torch

    from trainer.build import build_native
    from trainer.config import load_config
    from trainer.engine import NativeEngine
    from trainer.parallel.grid import Grid

    config = load_config(path, [*SIZES, *overrides])
    grid = Grid.single(torch.device("cuda", 0))
    engine = NativeEngine(build_native(config, grid)[0], grid)
    counts = []
    with gpu.reporting(Report()) as report:
        for seed in range(packings):
            engine.forward_backward([random_packing(config, seed)])
            counts.append(report.num_variants)
    return counts


def random_packing(config: Any, seed: int) -> Any:
    """One row of samples whose lengths are spread over all orders of magnitude."""
    import torch

    from data import Batch

    chance, length = random.Random(seed), config.data.seq_len
    lengths: list[int] = []
    while (left := length - sum(lengths)) > 0:
        lengths.append(min(left, round(length ** chance.random())))
    row = torch.ones(1, length, dtype=torch.int64).pin_memory()
    return Batch(row, row, [lengths])


def even_counts() -> Any:
    """Dispatch over expert ranks with as many rows to each: a fake GPU counts nothing."""
    from trainer.parallel.expert import ExpertDispatch
    from trainer.planning.dry_run import EvenDispatch

    begin_counts = ExpertDispatch.begin_counts

    def begin_even_counts(self: ExpertDispatch, *args: Any) -> Callable[[], Any]:
        pending = begin_counts(self, *args)
        even = EvenDispatch.begin_counts(self, *args)  # type: ignore[arg-type]
        return lambda: (pending()[0], *even()[1:])

    return patch.object(ExpertDispatch, "begin_counts", begin_even_counts)


def train_on_fake_gpu(
    path: Path,
    folder: Path,
    *overrides: str,
    world: int = 1,
    rank: int = 0,
    saves: bool = True,
) -> Parts:
    """Trains as one rank of `world`, in a process with a fake GPU."""
    parts = run(train, path, folder / "run", overrides, saves, world=world, rank=rank)
    assert isinstance(parts, Parts)
    return parts


def by_function(waits: Counter[str]) -> dict[str, int]:
    """Waits by the innermost function of the project, as `file (function)`."""
    counts: Counter[str] = Counter()
    for where, count in waits.items():
        innermost = where.split(" < ")[0].split(" ")
        counts[f"{innermost[-2].split(':')[0]} {innermost[-1]}"] += count
    return dict(counts)


COUNTS = "trainer/parallel/expert.py (wait)"
VOTE = "trainer/parallel/pipeline.py (_run_schedule)"
ALLOWED: dict[str, dict[str, int]] = {
    "step": {"trainer/to_host.py (to_host)": 1},
    "step with stats": {
        "trainer/to_host.py (to_host)": 1,
        "trainer/metrics/layer_hooks.py (to_host)": 1,
        "trainer/metrics/layer_stats.py (_local_ranges)": 1,
        "trainer/metrics/layer_stats.py (expert_load_stats)": 1,
        "trainer/metrics/update_stats.py (after_update)": 1,
    },
    "evaluation": {"trainer/evaluation/validation.py (_mean_over)": 1},
    "rest": {},
}
"""Waits by part of a run and function; a save waits for every tensor, and building is not timed."""


def faults(parts: Parts, expert_ranks: bool = False) -> dict[str, dict[str, int]]:
    """What should not have happened, by part of the run.

    Over expert ranks the host reads the numbers of rows in every layer. In the first step torch's
    pipeline stages vote on how they exchange their shapes.
    """
    named = [("step", report) for report in parts.steps[:-1]]
    named += [("step with stats", parts.steps[-1]), ("evaluation", parts.evaluation)]
    out = {"build": dict(parts.build.mixed + parts.build.refused), "save": parts.save.problems}
    for number, (name, report) in enumerate([*named, ("rest", parts.rest)]):
        waits = by_function(report.waits)
        problems = Counter(report.problems)
        if expert_ranks:
            waits.pop(COUNTS, None)
        if number == 0:
            waits.pop(VOTE, None)
            vote = {w: n for w, n in problems.items() if "(_run_schedule)" in w.split(" < ")[0]}
            problems -= Counter(vote)
        if waits != ALLOWED[name]:
            problems += report.waits
        out[f"{number}: {name}"] = dict(problems)
    return {name: problems for name, problems in out.items() if problems}
