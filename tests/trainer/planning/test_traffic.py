"""Bytes sent in a step: the formula, the counter, and what torch.distributed was really given."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from data import Batch
from tests.distributed import spawn
from tests.model.tiny import tiny_config
from trainer.build import build_native
from trainer.config import RunConfig
from trainer.engine import NativeEngine
from trainer.parallel.expert import ExpertDispatch
from trainer.parallel.grid import Grid
from trainer.planning.traffic import ExpertRows, GradientReduction, Work, step_traffic

# Runs of 12 tokens on four ranks: shorter than an HCA entry's 16, and the window's 8 reach back.
ROW, ROWS, MICRO_ROWS = 48, 8, 2
MODEL = tiny_config(
    vocab_size=400,
    num_hidden_layers=3,
    layer_types=("window", "csa", "hca"),
    num_attention_heads=4,
    o_groups=4,
    n_routed_experts=8,
    moe_intermediate_size=32,
    sliding_window=20,
    csa_compress_ratio=4,
    hca_compress_ratio=16,
    index_topk=4,
    num_hash_layers=1,
)

Degrees = dict[str, Any]
Bytes = dict[tuple[Any, str], int]

TOPOLOGIES: dict[int, list[Degrees]] = {
    2: [
        {},
        {"tensor": 2, "recompute": ("attention",)},
        {"tensor": 2, "query_matrices": "per_head", "recompute": ("block", "attention")},
        {"context": 2, "precision": "bf16", "grad_reduce_dtype": "bf16"},
        {"expert": 2, "recompute": ("block",), "expert_grad_reduce_dtype": "bf16_stochastic"},
        {"expert_tensor": 2},
        {"max_optimizer_padding": 0.001},
        {"tensor": 2, "attention": "sparse", "recompute": ("attention",)},
        {"tensor": 2, "attention": "dense"},
        {"context": 2, "attention": "sparse", "recompute": ("block",), "precision": "bf16"},
        {"pipeline": 2},
        {"pipeline": 2, "pipeline_schedule": "interleaved_1f1b"},
        {"pipeline": 2, "pipeline_schedule": "zero_bubble_v"},
    ],
    4: [
        {"tensor": 2, "context": 2, "expert": 4},
        {"tensor": 2, "context": 2, "attention": "sparse"},
        {"expert": 2, "max_optimizer_padding": 0.02},
        {"tensor": 4, "expert": 2, "expert_tensor": 2, "precision": "bf16"},
        {"context": 2, "pipeline": 2, "pipeline_schedule": "dual_pipe_v", "expert": 2},
    ],
}


@dataclass(frozen=True)
class Outcome:
    """Of one rank: by axis what was counted and what the formula gives; by ranks what was sent."""

    formula: Bytes
    counted: Bytes
    counted_by_ranks: Bytes
    really: Bytes


def run_config(degrees: Degrees) -> RunConfig:
    """A run of the tiny model; nothing is read from its paths."""
    parallel = {name: degree for name, degree in degrees.items() if name != "attention"}
    precision = parallel.pop("precision", "fp32")
    muon = {"query_matrices": parallel.pop("query_matrices", "whole")}
    data = {
        "sources": [{"name": "none", "paths": ["none"]}],
        "tokenizer": {"path": "none", "vocab_size": MODEL.vocab_size},
        "shards": "none",
        "seq_len": ROW,
        "global_batch_size": ROWS,
        "micro_batch_size": MICRO_ROWS,
    }
    return RunConfig.model_validate(
        {
            "run_dir": "none",
            "steps": 1,
            "precision": precision,
            "model": MODEL.model_dump(),
            "data": data,
            "optim": {"muon": muon},
            "parallel": parallel,
        }
    )


def batches_of(data_rank: int, count: int) -> list[Batch]:
    """Microbatches of rows with one to three samples, some with padding after them."""
    chance = random.Random(data_rank)
    generator = torch.Generator().manual_seed(data_rank)
    batches = []
    for _ in range(count):
        lengths = [chance.choice([[ROW], [7, 30], [20, 11, 17], []]) for _ in range(MICRO_ROWS)]
        shape = (MICRO_ROWS, ROW)
        tokens = torch.randint(3, MODEL.vocab_size, shape, generator=generator)
        batches.append(Batch(tokens, tokens.roll(-1, 1), lengths))
    return batches


class Wire(TorchDispatchMode):
    """Bytes that torch.distributed is told to send, as a ring sends them, by ranks and kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: defaultdict[tuple[Any, str], float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.see(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def see(self, name: str, args: Any) -> None:
        """One call of an operator of c10d; those that only receive send nothing."""
        if name.startswith("recv"):
            return
        boxed = next(a for a in args if isinstance(a, torch.ScriptObject))
        group = dist.ProcessGroup.unbox(boxed)
        ranks = tuple(dist.get_process_group_ranks(group))
        n = len(ranks)
        if name == "allreduce_":
            kind, size = "all_reduce", 2 * (n - 1) / n * sum(t.nbytes for t in args[0])
        elif name == "_allgather_base_":
            kind, size = "all_gather", (n - 1) * args[1].nbytes
        elif name == "_reduce_scatter_base_":
            kind, size = "reduce_scatter", (n - 1) / n * args[1].nbytes
        elif name == "alltoall_base_":
            split = args[4] or [args[1].shape[0] // n] * n
            rows = sum(split) - split[group.rank()]
            kind, size = "all_to_all", rows * args[1].element_size() * args[1][0:1].numel()
        elif name == "send":
            # When a schedule is made, torch's pipelining sends single numbers, and votes.
            kind, size = "send", sum(t.nbytes for t in args[0] if t.numel() > 1)
        else:
            raise AssertionError(f"unknown collective {name}")
        self.bytes[ranks, kind] += size


def rank_of_axis(grid: Grid) -> dict[str, tuple[int, ...]]:
    """The ranks of every axis by its name."""
    axes = ("tensor", "context", "sequence", "data", "pipeline", "stage", "tensor_replicas")
    axes += ("expert_all_to_all", "expert_tensor", "expert_data", "embedding", "world")
    return {name: getattr(grid, name).ranks for name in axes}


def one_step(degrees: Degrees, world: int, rank: int) -> Outcome:
    """One step at a topology."""
    config = run_config(degrees)
    grid = Grid.build(config.degrees(world), torch.device("cpu"))
    local, optimizer = build_native(config, grid)
    engine = NativeEngine(local, grid, optimizer)
    attention = degrees.get("attention", "select")
    engine.set_attention(attention)
    batches = batches_of(grid.data.rank, ROWS // MICRO_ROWS // grid.data.size)
    away = [0, 0]
    begin_counts = ExpertDispatch.begin_counts

    def spy(self: ExpertDispatch, *args: Any) -> Any:
        pending = begin_counts(self, *args)
        for place, rows in enumerate(pending()[1:]):
            away[place] += sum(rows) - rows[self.axis.rank]
        return pending

    grid.traffic.clear()
    with pytest.MonkeyPatch.context() as patch, Wire() as wire:
        patch.setattr(ExpertDispatch, "begin_counts", spy)
        engine.forward_backward(batches)
        engine.step(1e-3, engine.gradient_norm())
    runs = 1 + ("block" in config.parallel.recompute)
    work = Work(
        ROW,
        [batch.lengths for batch in batches],
        config.precision,
        config.parallel.recompute,
        ExpertRows(away[0] / runs, away[1] / runs),
        attention,
    )
    how = GradientReduction(
        config.parallel.grad_reduce_dtype,
        config.parallel.expert_grad_reduce_dtype,
        config.parallel.max_optimizer_padding,
    )
    formula = step_traffic(config.model, grid.degrees, local.stages, rank, work, config.optim, how)
    ranks = rank_of_axis(grid)
    for bucket in optimizer.buckets:
        for axis in (bucket.owners.axis, *[others.axis for others in bucket.group.replica_groups]):
            ranks[axis.name] = axis.ranks
    by_ranks: defaultdict[tuple[Any, str], int] = defaultdict(int)
    for (axis, kind), size in grid.traffic.bytes.items():
        by_ranks[ranks[axis], kind] += size
    return Outcome(formula, *map(without_zeros, (grid.traffic.bytes, by_ranks, wire.bytes)))


def without_zeros(sizes: Any) -> Bytes:
    return {key: round(size) for key, size in sizes.items() if size}


def steps(rank: int, world: int) -> list[Outcome]:
    """Worker: one step at every topology of this many ranks."""
    return [one_step(degrees, world, rank) for degrees in TOPOLOGIES[world]]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def outcomes(request: pytest.FixtureRequest) -> tuple[int, list[list[Outcome]]]:
    """Number of ranks, and by rank and topology what was sent."""
    return request.param, spawn(steps, request.param, timeout=280)


def test_counted_bytes_are_those_of_the_formula(
    outcomes: tuple[int, list[list[Outcome]]],
) -> None:
    world, by_rank = outcomes
    for rank, seen in enumerate(by_rank):
        for degrees, outcome in zip(TOPOLOGIES[world], seen, strict=True):
            assert outcome.counted == outcome.formula, (rank, degrees)
            assert len(outcome.formula) >= 2, (rank, degrees)


def test_every_byte_given_to_torch_is_counted(
    outcomes: tuple[int, list[list[Outcome]]],
) -> None:
    world, by_rank = outcomes
    for rank, seen in enumerate(by_rank):
        for degrees, outcome in zip(TOPOLOGIES[world], seen, strict=True):
            assert outcome.counted_by_ranks == outcome.really, (rank, degrees)


def test_even_routing_and_whole_rows_are_the_default() -> None:
    config = run_config({"expert": 2, "expert_tensor": 2})
    degrees, stages = config.degrees(4), config.parallel.stages(MODEL, ROW)
    work = Work.whole_rows(ROW, MICRO_ROWS, 1, "fp32")
    layers = MODEL.num_hidden_layers + MODEL.num_nextn_predict_layers
    # A row for each of the two parts of an expert; three of four ranks are others.
    rows = layers * MICRO_ROWS * ROW * MODEL.num_experts_per_tok * 2 * 3 / 4
    given = Work(ROW, [[[ROW]] * MICRO_ROWS], "fp32", expert_rows=ExpertRows(rows, rows))
    assert step_traffic(MODEL, degrees, stages, 0, work) == step_traffic(
        MODEL, degrees, stages, 0, given
    )


def test_no_number_where_no_formula_is() -> None:
    config = run_config({"tensor": 2})
    stages = config.parallel.stages(MODEL, ROW)
    work = Work(ROW, [[[4] * (ROW // 4)]], attention="sparse")
    with pytest.raises(ValueError, match="no formula"):
        step_traffic(MODEL, config.degrees(2), stages, 0, work)
    apart = run_config({"context": 2}).degrees(2)
    assert step_traffic(MODEL, apart, stages, 0, work)["sequence", "all_gather"] > 0


def test_formula_needs_no_torch() -> None:
    code = "import sys, trainer.planning.traffic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
