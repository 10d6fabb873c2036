"""Stochastic rounding, and what the groups refuse."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import Parameter

from optim import OptimConfig, OptimError, build_table
from optim.hybrid_zero import Group, HybridZero, round_stochastically
from optim.zero_plan import Held, plan_layout
from tests.optim.debug_parameters import SIZES


class _Alone:
    rank, size = 0, 1


def group(parameters: dict[str, Parameter], held: list[Held]) -> Group:
    layout = plan_layout(held, 1, 1, OptimConfig().muon)
    return Group(parameters, held, layout, _Alone(), _Alone())


def test_stochastic_rounding_has_no_bias() -> None:
    value = torch.tensor([1.0 + 2**-9, -3.3e-5, 1e20, 1.0])
    draws = torch.stack([round_stochastically(value, seed).double() for seed in range(4000)])
    step = value.abs().double() * 2**-7
    # The mean of n draws that are at most a step apart errs by step / (2 sqrt(n)).
    assert ((draws.mean(0) - value.double()).abs() <= 4 * step / (2 * 4000**0.5)).all()
    assert ((draws - value.double()).abs() <= step).all()
    assert len(draws[:, 0].unique()) == 2, "must go both ways"
    assert (draws[:, 3] == 1.0).all(), "what bf16 holds stays"
    nearest = (value.bfloat16().double() - value.double()).abs()
    assert nearest[0] > 4 * step[0] / (2 * 4000**0.5), "rounding to nearest would fail above"


def test_stochastic_rounding_keeps_what_is_not_finite() -> None:
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
    odd = torch.cat([odd, torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)])
    rounded = round_stochastically(odd, 1)
    assert rounded[:2].tolist() == [torch.inf, -torch.inf]
    assert rounded[2:].isnan().all()


def test_a_group_of_several_precisions_is_refused() -> None:
    names = {"norm.weight": (4,), "head.weight": (4, 4)}
    table = build_table(names, SIZES, OptimConfig())
    parameters = {
        "norm.weight": Parameter(torch.zeros(4)),
        "head.weight": Parameter(torch.zeros(4, 4, dtype=torch.bfloat16)),
    }
    held = [Held(entry, entry.shape) for entry in table]
    with pytest.raises(OptimError, match="several precisions"):
        HybridZero([group(parameters, held)], OptimConfig())
    with pytest.raises(OptimError, match=r"not in both: \['head.weight'\]"):
        HybridZero([group(parameters, held[:1])], OptimConfig())


class _Pair:
    """This rank and another one that sends the same; notes what it is asked to do."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.calls: list[str] = []

    def reduce_scatter(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        self.calls.append("scatter")
        return lambda: 2 * tensor[0]

    def all_gather(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: torch.cat([tensor, torch.zeros_like(tensor)])


def test_chunks_go_out_during_backward_in_one_order() -> None:
    """The last layer's first; one that waits for a gradient holds up those behind it."""
    names = {f"layers.{row}.attn.wkv.weight": (4, 8) for row in range(6)}
    table = build_table(names, SIZES, OptimConfig())
    parameters = {name: Parameter(torch.zeros(shape)) for name, shape in names.items()}
    held = [Held(entry, entry.shape) for entry in table]
    ranks = _Pair()
    layout = plan_layout(held, 2, 1, OptimConfig().muon)
    groups = [Group(parameters, held, layout, ranks, _Alone())]
    ours = HybridZero(groups, OptimConfig(), chunk_elements=64)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    ours.expect(dict.fromkeys(names, 2))

    def add(row: int) -> int:
        parameters[f"layers.{row}.attn.wkv.weight"].sum().backward()
        return len(ranks.calls)

    # Two matrices a chunk, two additions each: nothing goes out before the fourth.
    assert [add(row) for row in (5, 4, 5)] == [0, 0, 0] and add(4) == 1
    assert [add(row) for row in (1, 0, 1, 0)] == [1, 1, 1, 1], "2 and 3 are not there yet"
    assert [add(row) for row in (3, 2, 3)] == [1, 1, 1]
    assert add(2) == 3, "and then both"
    ours.reduce()
    assert len(ranks.calls) == 3
    gradients = list(ours.gradients())
    assert len(gradients) == 3
    assert all((piece.tensor == 4.0).all() for piece in gradients), "two additions on two ranks"


def test_what_gets_fewer_gradients_than_expected_is_sent_at_the_end() -> None:
    ranks, name = _Pair(), "layers.0.attn.wkv.weight"
    table = build_table({name: (4, 8), "layers.0.attn.wo_b.weight": (8, 4)}, SIZES, OptimConfig())
    parameters = {entry.name: Parameter(torch.zeros(entry.shape)) for entry in table}
    held = [Held(entry, entry.shape) for entry in table]
    layout = plan_layout(held, 2, 1, OptimConfig().muon)
    ours = HybridZero([Group(parameters, held, layout, ranks, _Alone())], OptimConfig())
    parameters[name].grad = torch.ones(4, 8)  # the other one is frozen
    ours.expect({name: 3})
    parameters[name].sum().backward()
    assert not ranks.calls
    ours.reduce()
    assert ranks.calls == ["scatter"]
    assert [(p.name, float(p.tensor.mean())) for p in ours.gradients()] in ([(name, 4.0)], [])
    before = {n: p.detach().clone() for n, p in parameters.items()}
    ours.step(0.1)
    assert torch.equal(parameters["layers.0.attn.wo_b.weight"], before["layers.0.attn.wo_b.weight"])
