"""Matmuls in FP8 against loops over tiles in float64, whose numbers are looked up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.kernels import fp8
from model.kernels.fp8 import eager
from model.kernels.fp8.naive import (
    E4M3,
    naive_operands,
    naive_quantise_dequantise,
    naive_round_e4m3,
)
from model.kernels.mxfp4 import from_fp8


def spread(*shape: int, seed: int) -> Tensor:
    """Numbers of many sizes, with tokens and channels that are small next to others.

    So numbers round to zero in a tile with the wrong neighbours, and keep 4 bits in the right.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    for own in (shape, (shape[-2], 1), (1, shape[-1])):
        x *= 2.0 ** torch.randint(-12, 4, own, generator=generator)
    return x


def test_the_list_of_numbers_is_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = codes[codes.isfinite()].double()
    assert torch.equal(finite.abs().unique(), E4M3)
    assert torch.equal(naive_round_e4m3(finite), finite)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(130, 150), (3, 128), (1, 7)])
def test_rounding_to_the_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = spread(*shape, seed=1).to(dtype)
    x[0, :3] = torch.tensor([448.0, 17.0, -19.0])  # the largest, and two ties
    x[-1] *= 0.0 if shape[0] > 1 else 1.0
    for rows, columns in ((1, 128), (128, 128), (128, 1)):
        computed = eager.quantise_dequantise(x, rows, columns)
        assert torch.equal(computed.double(), naive_quantise_dequantise(x, rows, columns))
        assert torch.equal(eager.quantise_dequantise(computed, rows, columns), computed)


@pytest.mark.parametrize("shape", [(130, 300), (128, 256), (5, 7)])
def test_codes_of_a_weight_times_its_scales_are_the_rounded_numbers(shape: tuple[int, int]) -> None:
    x = spread(*shape, seed=3)
    codes, scales = eager.quantise_blocks(x)
    assert codes.dtype == torch.float8_e4m3fn and scales.dtype == torch.float8_e8m0fnu
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    rounded = naive_quantise_dequantise(x, 128, 128).float()
    assert torch.equal(from_fp8(codes, scales), rounded)
    x[0, 0] = torch.inf
    scales = eager.quantise_blocks(x)[1].float()
    assert scales[0, 0].isnan() and scales.flatten()[1:].isfinite().all()


def test_scales_reach_from_the_least_to_the_largest_number() -> None:
    for value in (3e38, 1e-30, 448 * 2.0**-117, 2.0**-126, 0.0):
        x = torch.full((1, 128), value)
        assert eager.quantise_dequantise(x, 1, 128)[0, 0] == pytest.approx(value, rel=2**-4)
    for value in (torch.inf, torch.nan):
        x = torch.ones(2, 128).index_fill(1, torch.tensor([5]), value)
        x[1] = 1.0
        computed = eager.quantise_dequantise(x, 1, 128)
        assert computed[0].isnan().all() and computed[1].eq(1).all()


Sums = tuple[Tensor, Tensor]
"""A matmul, and the sums of the magnitudes of its terms."""


def sums(a: Tensor, b: Tensor) -> Sums:
    return a @ b, a.abs() @ b.abs()


def matmuls_of(x: Tensor, weight: Tensor, grad: Tensor) -> list[Sums]:
    """Output and both gradients in float64."""
    return [sums(*operands) for operands in naive_operands(x, weight, grad)]


def close(computed: Tensor | None, expected: Sums) -> None:
    """fp32 sums of at most 300 products, each rounded by half of 2^-23."""
    assert computed is not None
    value, size = expected
    assert ((computed - value).abs() <= 300 * 2.0**-24 * size).all()


def test_linear_and_its_gradients() -> None:
    tokens, inputs, outputs = 2 * 131, 200, 136
    x = spread(2, 131, inputs, seed=1).requires_grad_()
    weight = spread(outputs, inputs, seed=2).requires_grad_()
    grad = spread(2, 131, outputs, seed=3)
    y = fp8.linear(x, weight)
    y.backward(grad)
    flat = x.detach().view(tokens, inputs), weight.detach(), grad.view(tokens, outputs)
    expected_y, grad_x, grad_weight = matmuls_of(*flat)
    close(y.view(tokens, outputs), expected_y)
    assert x.grad is not None
    close(x.grad.view(tokens, inputs), grad_x)
    close(weight.grad, grad_weight)
    plain = flat[0].double() @ flat[1].double().t()  # the negative control: rounding shows
    assert (y.view(tokens, outputs) - plain).abs().max() > 1e-3 * plain.abs().max()


def test_batched_is_every_group_by_itself() -> None:
    x, weight, grad = spread(3, 5, 140, seed=1), spread(3, 9, 140, seed=2), spread(3, 5, 9, seed=3)
    x.requires_grad_(), weight.requires_grad_()
    y = fp8.batched(x, weight)
    y.backward(grad)
    for g in range(3):
        expected_y, grad_x, grad_weight = matmuls_of(x[g].detach(), weight[g].detach(), grad[g])
        close(y[g], expected_y)
        assert x.grad is not None and weight.grad is not None
        close(x.grad[g], grad_x)
        close(weight.grad[g], grad_weight)


def test_grouped_rows_and_their_gradients() -> None:
    """Groups of no rows, of less than a tile and of more; what is after the last is poison."""
    ends = torch.tensor([144, 144, 176, 432], dtype=torch.int32)
    rows = 448
    x, grad = spread(rows, 48, seed=1), spread(rows, 136, seed=2)
    weight = spread(4, 136, 48, seed=3).requires_grad_()
    x[432:] = torch.nan
    grad[432:] = torch.nan
    x.requires_grad_()
    y = fp8.grouped(x, weight, ends)
    y.backward(grad)
    assert x.grad is not None and weight.grad is not None
    for group, (first, end) in enumerate(((0, 144), (144, 144), (144, 176), (176, 432))):
        some = slice(first, end)
        if first == end:
            assert weight.grad[group].eq(0).all()
            continue
        expected_y, grad_x, grad_weight = matmuls_of(
            x[some].detach(), weight[group].detach(), grad[some]
        )
        close(y[some], expected_y)
        close(x.grad[some], grad_x)
        close(weight.grad[group], grad_weight)


def test_bf16_multiplies_the_same_numbers() -> None:
    """bf16 holds every rounded number, so that only sums and results are rounded otherwise."""
    x, weight = spread(64, 256, seed=1).bfloat16(), spread(40, 256, seed=2).bfloat16()
    wide = fp8.linear(x.float(), weight.float())
    narrow = fp8.linear(x, weight)
    assert narrow.dtype == torch.bfloat16
    assert (narrow - wide).abs().max() <= 2**-8 * wide.abs().max()
