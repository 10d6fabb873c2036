"""Rounding of keys and entries against loops over blocks, and through the attention kernels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.kernels.fp8.kv import fake_quantise_kv
from model.kernels.fp8.naive import naive_round_e4m3
from tests.model.kernels.attention.test_attention_triton import CASES, RTOL, inputs, run
from tests.model.kernels.compare import assert_same, rand
from tests.model.kernels.interpreter import interpreted


def reference(kv_NK: Tensor, rotary: int) -> Tensor:
    """The official code's rule, block by block, float64."""
    out = kv_NK.detach().double().clone()
    for row in out[:, : out.shape[1] - rotary]:
        for block in row.split(64) if len(row) else ():
            largest = max(float(block.abs().max()), 1e-4)
            scale = 2.0 ** math.ceil(math.log2(largest / 448))
            block.copy_(naive_round_e4m3(block / scale) * scale)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "rotary"), [(512, 64), (32, 8), (200, 64), (8, 8)])
def test_rounding_to_the_bit(width: int, rotary: int, dtype: torch.dtype) -> None:
    kv = rand(40, width, seed=0)
    kv *= 2.0 ** torch.randint(-30, 20, (40, 1), generator=torch.Generator().manual_seed(1))
    kv[0, :3] = torch.tensor([448.0, 17.0, -19.0])  # the largest, and two ties
    kv[1] = 1e-4 * 2.0**-10  # below the least largest, whose scale it gets
    kv[2] = 0.0
    kv = kv.to(dtype)
    rounded = fake_quantise_kv(kv, rotary)
    assert rounded.dtype == dtype
    assert torch.equal(rounded.double(), reference(kv, rotary))
    assert torch.equal(rounded[:, width - rotary :], kv[:, width - rotary :])
    assert torch.equal(fake_quantise_kv(rounded, rotary), rounded)


def test_what_is_not_finite_makes_its_block_nan() -> None:
    kv = torch.ones(2, 136)
    kv[0, 70] = torch.inf
    rounded = fake_quantise_kv(kv, 8)
    assert rounded[0, 64:128].isnan().all() and rounded.nan_to_num(1.0).eq(1.0).all()
    assert int(rounded.isnan().sum()) == 64


def test_no_entries_and_gradients_straight_through() -> None:
    assert fake_quantise_kv(torch.ones(0, 72), 8).shape == (0, 72)
    kv, upstream = rand(5, 72).requires_grad_(), rand(5, 72, seed=1)
    fake_quantise_kv(kv, 8).backward(upstream)
    assert torch.equal(kv.grad, upstream)


@interpreted
def test_attention_kernels_take_rounded_keys_and_entries() -> None:
    """Outputs are those of the rounded numbers; gradients arrive at the unrounded ones."""
    case = CASES["short samples"]

    def rounded(q: Tensor, kv: Tensor, entries: Tensor, sink: Tensor) -> tuple[Tensor, ...]:
        return q, fake_quantise_kv(kv, 2), fake_quantise_kv(entries, 2), sink

    leaves = inputs(case, seed=0)
    assert_same(
        lambda *x: run(case, *rounded(*x)), lambda *x: case.naive(*rounded(*x)), leaves, RTOL
    )
    with pytest.raises(AssertionError, match="result 0"):
        assert_same(lambda *x: run(case, *rounded(*x)), case.naive, leaves, RTOL)
