"""The optimizer and the norm on parts of the parameters equal those on the whole."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from optim import OptimConfig, OptimError, Optimizer, Shard, build_table, gradient_norm
from tests.distributed import spawn
from tests.optim.debug_parameters import SIZES, shapes
from trainer.parallel.collectives import sum_
from trainer.parallel.grid import Grid, Sizes
from trainer.parallel.placement import Placement, place_all
from trainer.parallel.shards import shards_of

STEPS = 4
Case = tuple[Sizes, dict[str, object], torch.dtype]
FP32, BF16 = torch.float32, torch.bfloat16

# Splits of heads, groups, vocabulary and shared experts; of the experts; of each expert; all.
ON_TWO: list[Case] = [
    (Sizes(2, tensor=2), {"query_matrices": "whole"}, FP32),
    (Sizes(2, tensor=2), {"query_matrices": "per_head", "batch_bytes": 1}, FP32),
    (Sizes(2, tensor=2), {}, BF16),
    (Sizes(2, expert=2), {"batch_bytes": 20_000}, FP32),
    (Sizes(2, expert_tensor=2), {"batch_bytes": 20_000}, FP32),
    (Sizes(2, tensor=2, expert=2), {"query_matrices": "per_head"}, FP32),
]
ON_FOUR: list[Case] = [
    (Sizes(4, tensor=2, expert_tensor=2, expert=2), {"query_matrices": "whole"}, FP32),
    (Sizes(4, tensor=2, expert_tensor=4), {"query_matrices": "per_head"}, FP32),
    (Sizes(4, expert=2), {}, FP32),
]


def values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes().items()}


def as_parameters(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Parameter]:
    return {
        name: Parameter(tensor.clone().to(dtype if tensor.dim() > 1 else FP32))
        for name, tensor in tensors.items()
    }


def table_shape(placement: Placement) -> tuple[int, ...]:
    """Whole, but for the experts, of which only the local ones stand in the table."""
    if placement.kind == "expert":
        return placement.size[0], *placement.shape[1:]
    return placement.shape


def optimizer_of(
    parameters: Mapping[str, Parameter],
    placements: Mapping[str, Placement],
    muon: dict[str, object],
    shards: Mapping[str, Shard] | None = None,
) -> Optimizer:
    config = OptimConfig(muon=muon)
    table = build_table({n: table_shape(p) for n, p in placements.items()}, SIZES, config)
    return Optimizer(parameters, table, config, shards)


def relative_error(part: Tensor, whole: Tensor) -> float:
    return float((part - whole).norm() / whole.norm().clamp(min=1e-30))


def run_case(case: Case, rank: int) -> dict[str, float]:
    """Errors relative to the whole by name of the weight or state, and of the gradient norm."""
    sizes, muon, dtype = case
    grid = Grid.build(sizes, torch.device("cpu"))
    placements = place_all(shapes(), sizes, rank)
    alone = as_parameters(values(0), dtype)
    parts = as_parameters({n: placements[n].own(t) for n, t in values(0).items()}, dtype)
    reference = optimizer_of(alone, place_all(shapes(), Sizes(1), 0), muon)
    ours = optimizer_of(parts, placements, muon, shards_of(placements, grid))
    errors = {}
    for step in range(1, STEPS + 1):
        for name, gradient in values(step).items():
            alone[name].grad = gradient.to(alone[name].dtype)
            parts[name].grad = placements[name].own(alone[name].grad)
        replicas = [placements[name].replicas for name in parts]
        norm = gradient_norm(parts.values(), replicas, lambda x: sum_(x, grid.world))
        errors[f"norm {step}"] = relative_error(norm, gradient_norm(alone.values()))
        reference.step(0.02)
        ours.step(0.02)
    states = ours.state_tensors()
    for key, whole in reference.state_tensors().items():
        if not key.startswith("step."):
            whole = placements[key.split(".", 1)[1]].own(whole)
        errors[key] = relative_error(states[key], whole)
    assert states.keys() == reference.state_tensors().keys()
    for name, parameter in parts.items():
        whole = placements[name].own(alone[name].detach())
        assert parameter.shape == whole.shape
        errors[name] = relative_error(parameter.detach().float(), whole.float())
    return errors


def run_cases(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, float]]:
    return [run_case(case, rank) for case in cases]


@pytest.mark.parametrize("cases", [ON_TWO, ON_FOUR], ids=["two ranks", "four ranks"])
def test_parts_end_like_the_whole(cases: list[Case]) -> None:
    for by_case in spawn(run_cases, cases[0][0].world, cases):
        for case, errors in zip(cases, by_case, strict=True):
            assert len(errors) > 100
            wrong = {name: error for name, error in errors.items() if not error < 1e-6}
            assert not wrong, case


def traffic_of_steps(rank: int, world_size: int) -> list[dict[str, tuple[int, int]]]:
    """Bytes and calls of gathers in one step, for the two readings of wq_b and for experts."""
    seen = []
    for sizes, muon in [
        (Sizes(2, tensor=2), {"query_matrices": "whole"}),
        (Sizes(2, tensor=2), {"query_matrices": "per_head"}),
        (Sizes(2, expert=2), {}),
        (Sizes(2, expert_tensor=2), {"batch_bytes": 2 * 4 * 48 * 20}),
    ]:
        grid = Grid.build(sizes, torch.device("cpu"))
        names = ["layers.0.attn.wq_b.weight", "layers.0.attn.wo_a.weight", "embed.weight"]
        names += ["layers.0.ffn.experts.w2"]
        placements = place_all({name: shapes()[name] for name in names}, sizes, rank)
        parts = as_parameters({n: placements[n].own(values(0)[n]) for n in names}, FP32)
        ours = optimizer_of(parts, placements, muon, shards_of(placements, grid))
        for parameter in parts.values():
            parameter.grad = torch.randn_like(parameter)
        ours.step(0.02)
        traffic = grid.traffic
        assert all(collective == "gather" for _, collective in traffic.bytes)
        seen.append({a: (traffic.bytes[a, c], traffic.calls[a, c]) for a, c in traffic.bytes})
    return seen


def test_only_cut_matrices_travel_and_few_at_once() -> None:
    wq_b, expert = 64 * 24 * 4, 48 * 20 * 4
    for whole, per_head, experts, expert_tensor in spawn(traffic_of_steps, 2):
        assert whole == {"tensor": (wq_b // 2, 1)}, "one fp32 tensor; groups and AdamW need none"
        assert per_head == {} and experts == {}
        assert expert_tensor == {"expert_tensor": (6 * expert // 2, 3)}, "two experts at once"


class Third:
    """The first third along dim 0, of whatever."""

    def gather(self, local: Tensor) -> Tensor:
        return torch.cat([local] * 3)

    def own(self, whole: Tensor) -> Tensor:
        return whole.narrow(0, 0, whole.size(0) // 3)


@pytest.mark.parametrize(
    ("shape", "rows", "shard", "message"),
    [
        ((12, 32), 6, None, "another shape"),
        ((12, 32), 12, Third(), "another shape"),
        ((12, 32), 4, Third(), r"2 matrices of 6 rows, .* \[4, 32\] of \[12, 32\]"),
    ],
)
def test_parts_that_do_not_fit(
    shape: tuple[int, int], rows: int, shard: Shard | None, message: str
) -> None:
    name = "layers.0.attn.wo_a.weight"
    config = OptimConfig()
    table = build_table({name: shape}, SIZES, config)
    parameters = {name: Parameter(torch.zeros(rows, 32))}
    with pytest.raises(OptimError, match=message):
        Optimizer(parameters, table, config, {name: shard} if shard else None)
