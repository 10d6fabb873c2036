"""Products in FP8 beside loops over tiles in float64, whose numbers are looked up one by one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from model.kernels.fp8 import fp8

# Every finite number of E4M3, by its definition: sign, 4 bits of exponent, 3 of fraction.
NUMBERS = np.array(
    sorted(
        sign * (fraction / 8 * 2.0**-6 if not power else (1 + fraction / 8) * 2.0 ** (power - 7))
        for sign in (1, -1)
        for power in range(16)
        for fraction in range(8)
        if (power, fraction) != (15, 7) and (sign == 1 or power or fraction)
    )
)
EVEN = {n: (abs(n) / 2.0 ** max(np.floor(np.log2(abs(n))), -6) * 8) % 2 == 0 for n in NUMBERS if n}
EVEN[0.0] = True


def nearest(value: float) -> float:
    above = int(np.searchsorted(NUMBERS, value))
    near = NUMBERS[max(above - 1, 0) : above + 1]
    gaps = np.abs(near - value)
    if len(near) == 2 and gaps[0] == gaps[1]:
        return float(near[0] if EVEN[near[0]] else near[1])
    return float(near[np.argmin(gaps)])


def tile_rounded(tile: np.ndarray) -> np.ndarray:
    largest, exponent = np.abs(tile).max(), -117
    while largest > 448 * 2.0**exponent:
        exponent += 1
    return np.vectorize(nearest)(tile / 2.0**exponent) * 2.0**exponent


def rounded(x: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """[R, C] with borders of tiles at these rows and columns."""
    out = x.double().numpy().copy()
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            tile = out[top:bottom, left:right]
            if tile.size:
                tile[:] = tile_rounded(tile)
    return torch.from_numpy(out)


def every(step: int, size: int) -> list[int]:
    return [*range(0, size, step), size]


def row_tiles(x: Tensor) -> Tensor:
    return rounded(x, every(1, x.shape[0]), every(128, x.shape[1]))


def blocks(x: Tensor) -> Tensor:
    return rounded(x, every(128, x.shape[0]), every(128, x.shape[1]))


def column_tiles(x: Tensor) -> Tensor:
    return rounded(x, every(128, x.shape[0]), every(1, x.shape[1]))


def spread(*shape: int, seed: int) -> Tensor:
    """Numbers of many sizes, with tokens and channels that are small beside others.

    So numbers round to zero in a tile with the wrong neighbours, and keep four bits in the right.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    for own in (shape, (shape[-2], 1), (1, shape[-1])):
        x *= 2.0 ** torch.randint(-12, 4, own, generator=generator)
    return x


def test_the_list_of_numbers_is_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert set(NUMBERS) == set(codes[codes.isfinite()].tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(130, 150), (3, 128), (1, 7)])
def test_rounding_to_the_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = spread(*shape, seed=1).to(dtype)
    x[0, :3] = torch.tensor([448.0, 17.0, -19.0])  # the largest, and two ties
    x[-1] *= 0.0 if shape[0] > 1 else 1.0
    for (rows, columns), reference in (
        ((1, 128), row_tiles(x)),
        ((128, 128), blocks(x)),
        ((128, 1), column_tiles(x)),
    ):
        assert torch.equal(fp8.rounded(x, rows, columns).double(), reference)
        again = fp8.rounded(x, rows, columns)
        assert torch.equal(fp8.rounded(again, rows, columns), again)


def test_scales_reach_from_the_least_to_the_largest_number() -> None:
    for value in (3e38, 1e-30, 448 * 2.0**-117, 2.0**-126, 0.0):
        x = torch.full((1, 128), value)
        assert fp8.rounded(x, 1, 128)[0, 0] == pytest.approx(value, rel=2**-4)
    for value in (torch.inf, torch.nan):
        x = torch.ones(2, 128).index_fill(1, torch.tensor([5]), value)
        x[1] = 1.0
        found = fp8.rounded(x, 1, 128)
        assert found[0].isnan().all() and found[1].eq(1).all()


Sums = tuple[Tensor, Tensor]
"""Sums of products, and the sums of their magnitudes."""


def sums(a: Tensor, b: Tensor) -> Sums:
    return a @ b, a.abs() @ b.abs()


def products_of(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Sums, Sums, Sums]:
    """Output and both gradients in float64, rounded as model/kernels/fp8/fp8.py says."""
    y = sums(row_tiles(x), blocks(weight).t())
    grad_x = sums(row_tiles(grad), blocks(weight))
    return y, grad_x, sums(column_tiles(grad).t(), column_tiles(x))


def close(found: Tensor | None, expected: Sums) -> None:
    """fp32 sums of at most 300 products, each rounded by half of 2^-23."""
    assert found is not None
    value, size = expected
    assert ((found - value).abs() <= 300 * 2.0**-24 * size).all()


def test_linear_and_its_gradients() -> None:
    tokens, inputs, outputs = 2 * 131, 200, 136
    x = spread(2, 131, inputs, seed=1).requires_grad_()
    weight = spread(outputs, inputs, seed=2).requires_grad_()
    grad = spread(2, 131, outputs, seed=3)
    y = fp8.linear(x, weight)
    y.backward(grad)
    flat = x.detach().view(tokens, inputs), weight.detach(), grad.view(tokens, outputs)
    expected_y, grad_x, grad_weight = products_of(*flat)
    close(y.view(tokens, outputs), expected_y)
    assert x.grad is not None
    close(x.grad.view(tokens, inputs), grad_x)
    close(weight.grad, grad_weight)
    plain = flat[0].double() @ flat[1].double().t()  # the negative control: rounding is seen
    assert (y.view(tokens, outputs) - plain).abs().max() > 1e-3 * plain.abs().max()


def test_batched_is_every_group_by_itself() -> None:
    x, weight, grad = spread(3, 5, 140, seed=1), spread(3, 9, 140, seed=2), spread(3, 5, 9, seed=3)
    x.requires_grad_(), weight.requires_grad_()
    y = fp8.batched(x, weight)
    y.backward(grad)
    for g in range(3):
        expected_y, grad_x, grad_weight = products_of(x[g].detach(), weight[g].detach(), grad[g])
        close(y[g], expected_y)
        assert x.grad is not None and weight.grad is not None
        close(x.grad[g], grad_x)
        close(weight.grad[g], grad_weight)


def test_grouped_rows_and_their_gradients() -> None:
    """Groups of no rows, of less than a tile and of more; what is behind the last is poison."""
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
        expected_y, grad_x, grad_weight = products_of(
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
