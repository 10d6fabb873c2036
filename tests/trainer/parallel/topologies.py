"""One small run with every kind of layer, trained at any topology and compared with one rank."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.distributed import spawn
from tests.trainer.tiny import column, train
from trainer.config import load_run
from trainer.export.import_run import open_run
from trainer.metrics.jsonl import read_metrics
from trainer.parallel.grid import Grid

# Four heads and groups split over up to four tensor ranks; rows of 48 over up to eight runs of
# six tokens, shorter than the window of 8 and than the 16 tokens of an HCA entry.
MODEL = (
    "model.num_hidden_layers=4",
    "model.layer_types=[window, csa, hca, csa]",
    "model.num_attention_heads=4",
    "model.hc_mult=4",
    # Scores that are far apart, and a seed with which no choice is close: see close_calls.py.
    "model.initializer_range=0.2",
    "seed=44",
    "model.o_groups=4",
    "model.n_routed_experts=8",
    "model.moe_intermediate_size=32",
    "data.global_batch_size=4",
    "data.micro_batch_size=1",
    "evaluation.max_rows=4",
    "steps=10",
    # The gradients of some of the streams' coefficients are nothing but rounding (the first
    # layer's streams are copies, a norm undoes how they are weighed). With V4's eps of 1e-20 AdamW
    # would follow it as if it were a gradient of any other size.
    "optim.adamw.eps=1e-5",
    # Likewise Newton-Schulz makes something of the directions in which a matrix's gradient is
    # nothing but rounding (Sinkhorn's result does not depend on some of the logits' sums).
    "optim.learning_rate=2.5e-4",
)


@dataclass(frozen=True)
class Topology:
    """Processes and the overrides that divide them."""

    world: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        axes = [word.removeprefix("parallel.").replace("=", " ") for word in self.overrides]
        return f"{self.world} ranks, {', '.join(axes) or 'data'}"


def topology(world: int, *more: str, **degrees: object) -> Topology:
    """E.g. topology(4, tensor=2, context=2)."""
    overrides = tuple(f"parallel.{name}={value}" for name, value in degrees.items())
    return Topology(world, overrides + more)


@dataclass(frozen=True)
class Outcome:
    """Losses by step, the validation loss, and the final weights whole."""

    losses: dict[str, list[float]]
    validation: float
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """Training in a run folder, from its checkpoint if it has one, to the end or to a step."""

    topology: Topology
    run_dir: Path
    stop_at: int = 0


def run_jobs(rank: int, world: int, path: Path, jobs: list[Job], more: tuple[str, ...]) -> None:
    """Worker: several runs one after another."""
    os.environ["WORLD_SIZE"] = str(world)
    for job in jobs:
        overrides = (*MODEL, *job.topology.overrides, *more)
        train(path, job.run_dir, *overrides, stop_at=job.stop_at)


def run_all(path: Path, jobs: list[Job], *more: str) -> None:
    """Every job on its number of processes, which are started once for all jobs of a number."""
    for world in sorted({job.topology.world for job in jobs}):
        jobs_of_world = [job for job in jobs if job.topology.world == world]
        if world == 1:
            run_jobs(0, 1, path, jobs_of_world, more)
            os.environ.pop("WORLD_SIZE")
        else:
            limit = 60 + 30 * world * len(jobs_of_world)
            spawn(run_jobs, world, path, jobs_of_world, more, timeout=limit)


def outcome(run_dir: Path) -> Outcome:
    """What a run came to."""
    local, _ = open_run(load_run(run_dir).alone(), Grid.single())
    names = ("loss", "lm_loss", "mtp_loss", "balance_loss", "grad_norm", "expert_load_max")
    return Outcome(
        {name: column(run_dir, name) for name in names},
        read_metrics(run_dir / "metrics.jsonl")[-1]["validation_loss"],
        {name: tensor.clone() for name, tensor in local.model.state_dict().items()},
    )


def differences(one: Outcome, other: Outcome) -> tuple[float, float, str]:
    """Largest relative difference of any loss of any step and of any tensor, and whose it is.

    Tensors differ by the norm of their difference over their norm.
    """
    worst = abs(one.validation - other.validation) / abs(one.validation)
    for name in ("loss", "lm_loss", "mtp_loss", "grad_norm"):
        for a, b in zip(one.losses[name], other.losses[name], strict=True):
            worst = max(worst, abs(a - b) / abs(a))
    assert one.losses["expert_load_max"] == other.losses["expert_load_max"]
    errors = {}
    for name, ours in one.weights.items():
        if ours.is_floating_point():
            size = max(float(ours.norm()), 1e-30)
            errors[name] = float((ours - other.weights[name]).norm()) / size
    weight = max(errors, key=lambda name: errors[name])
    assert all(torch.isfinite(t).all() for t in other.weights.values())
    return worst, errors[weight], weight


def assert_trains_like(one: Outcome, other: Outcome, name: str) -> None:
    """Sums over ranks are in another order: losses within 1e-5, weights within 1e-4 by the norm."""
    losses, weights, worst = differences(one, other)
    print(f"{name} | {losses:.1e} | {weights:.1e} | {worst}")
    assert losses < 1e-5
    assert weights < 1e-4, worst
