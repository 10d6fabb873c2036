"""Stochastic rounding, and what the groups refuse."""

import pytest
import torch
from torch.nn import Parameter

from optim import OptimConfig, OptimError, build_table
from optim.hybrid_zero import Group, HybridZero, round_stochastically
from optim.zero_plan import Held
from tests.optim.debug_parameters import SIZES


class _Alone:
    rank, size = 0, 1


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
        HybridZero([Group(parameters, held, _Alone(), _Alone())], OptimConfig())
    with pytest.raises(OptimError, match=r"not in both: \['head.weight'\]"):
        HybridZero([Group(parameters, held[:1], _Alone(), _Alone())], OptimConfig())
