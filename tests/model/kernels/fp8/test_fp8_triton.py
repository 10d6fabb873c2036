"""Triton's rounding to FP8 and its matmuls, in the interpreter.

What is rounded is compared to the bit with ``model.kernels.fp8.eager``, which other tests compare
with loops over tiles; matmuls with float64 sums of the same rounded operands. A product of two E4M3
numbers is exact in fp32 and powers of two are as well: what may differ is K sums' rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from model.kernels.fp8 import eager
from model.kernels.operations import Choice
from model.linear import fp8_matmuls
from tests.model.kernels.compare import rand
from tests.model.kernels.fp8.test_fp8 import Sums, spread, sums
from tests.model.kernels.interpreter import interpreted, last_program_first

if TYPE_CHECKING:
    from model.kernels.fp8.quantise_triton import Codes
    from model.kernels.row_tiles_triton import Tiles

ENDS = (40, 40, 190, 195)
"""A group of less than a tile, one of no rows, one of a tile and a bit, one of a few rows."""
ROWS, INPUTS, OUTPUTS = 208, 200, 136


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """Small bands: these few tiles fill several, the last in part."""
    from model.kernels.fp8 import matmul_triton

    old, matmul_triton._BAND = matmul_triton._BAND, 2
    try:
        yield
    finally:
        matmul_triton._BAND = old


def ends_of(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


def drawn(poison: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weights and the output's gradient; what is after the last group is poison."""
    x, grad = spread(ROWS, INPUTS, seed=1), spread(ROWS, OUTPUTS, seed=2)
    if poison:
        x[ENDS[-1] :] = grad[ENDS[-1] :] = torch.nan
    return x, spread(len(ENDS), OUTPUTS, INPUTS, seed=3), grad


def assert_same_bits(computed: Tensor, expected: Tensor) -> None:
    """Zeros have signs; NaN is NaN."""
    assert torch.equal(computed.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(computed[numbers].view(torch.int32), expected[numbers].view(torch.int32))


def values(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes times scales of as many dims, each repeated along those where it is for 128."""
    for dim, size in enumerate(codes.shape):
        if scales.shape[dim] < size:
            scales = scales.repeat_interleave(128, dim).narrow(dim, 0, size)
    return codes.float() * scales


def rounded_by_kernel(x: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """By rows and by columns, as [P, C]; NaN where no group's row is."""
    from model.kernels.fp8.quantise_triton import quantise
    from model.kernels.row_tiles_triton import tiles_of

    tiles = tiles_of(ends, len(x))
    rows, columns = quantise(x, tiles, rows=True, columns=True)
    for alone in (True, False):
        first, second = quantise(x, tiles, rows=alone, columns=not alone)
        codes, other = (first, second) if alone else (second, first)
        assert_same_codes(codes, rows if alone else columns)
        assert other.codes.numel() == other.scales.numel() == 0
    by_row = values(rows.codes, rows.scales.t())
    live = int(ends[-1])
    assert by_row[:live, x.shape[1] :].nan_to_num().eq(0).all()
    return by_row[:, : x.shape[1]], columns_of(columns, tiles, len(x))


def columns_of(columns: Codes, tiles: Tiles, rows: int) -> Tensor:
    """What columns stand for, [P, C]; NaN where no group's row is. What fills a tile up is 0."""
    tile_NCK = columns.codes.float() * columns.scales[..., None]
    out = torch.full_like(tile_NCK[0, :, :1], torch.nan).t().repeat(rows, 1)
    for tile, first, end in zip(tile_NCK, tiles.first.tolist(), tiles.end.tolist(), strict=True):
        out[first:end] = tile.t()[: end - first]
        if end > first:
            assert tile[:, end - first :].nan_to_num().eq(0).all()
    return out


def assert_same_codes(computed: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for actual, other in zip(computed, expected, strict=True):
        kind = torch.uint8 if actual.element_size() == 1 else torch.int32
        assert torch.equal(actual.view(kind), other.view(kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@interpreted
def test_rows_and_columns_to_the_bit(dtype):
    x, _, _ = drawn()
    x[3, 40:43] = torch.tensor([448.0, 17.0, -19.0])  # the largest, and two ties
    x[5] = -0.0
    x[50, 7], x[180, 130], x[192, 131] = torch.inf, torch.nan, -torch.inf
    x, ends = x.to(dtype), ends_of(*ENDS)
    live = ENDS[-1]
    by_row, by_column = rounded_by_kernel(x, ends)
    assert_same_bits(by_row[:live], eager.quantise_dequantise(x, 1, 128)[:live].float())
    tile_P = eager.tiles_of_groups(ends, ROWS)
    expected = eager.quantise_dequantise_by_tile(x, tile_P, len(ENDS))
    assert_same_bits(by_column[:live], expected[:live].float())
    assert by_row.isnan().any() and by_column.isnan().any()


@pytest.mark.parametrize("mixed", [False, True])
@interpreted
def test_every_bf16_number_is_rounded(mixed):
    """In order, 128 numbers of one power of two share a tile of a row; mixed, of any power.

    As fp32, since the interpreter misreads bf16's subnormal numbers.
    """
    bits = torch.arange(-(2**15), 2**15)
    if mixed:
        finite = bits[(bits & 0x7F80) != 0x7F80]
        order = torch.randperm(len(finite), generator=torch.Generator().manual_seed(0))
        bits = finite[order][: len(finite) // 128 * 128]
    x = bits.to(torch.int16).view(torch.bfloat16).float().view(-1, 128)
    if mixed:  # or every tile has a number of 10^38
        x = x * torch.exp2(-torch.linspace(0, 200, len(x)))[:, None]
    by_row, by_column = rounded_by_kernel(x, ends_of(len(x)))
    assert_same_bits(by_row, eager.quantise_dequantise(x, 1, 128).float())
    assert_same_bits(by_column, eager.quantise_dequantise(x, 128, 1).float())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(3, 136, 300), (1, 128, 128), (2, 1, 7)])
@interpreted
def test_weights_to_the_bit(shape, transposed):
    from model.kernels.fp8.quantise_triton import quantise_weight

    weight = spread(*shape, seed=1)
    weight[0, 0, -1] = torch.nan
    weight[-1, -1, :3] *= -0.0
    codes, scales = quantise_weight(weight, transposed=transposed)
    width = shape[1] if transposed else shape[2]
    computed = values(codes, scales)
    assert computed[..., width:].nan_to_num().eq(0).all()
    computed = computed[..., :width]
    expected = eager.quantise_dequantise(weight, 128, 128)
    assert_same_bits(computed.transpose(1, 2) if transposed else computed, expected)


@pytest.mark.parametrize(
    ("ends", "rows"),
    [(ENDS, ROWS), ((0, 0, 0), 0), ((1, 2, 131, 131, 259), 259), ((128, 256), 300), ((5,), 5)],
)
@interpreted
def test_tiles_are_those_of_the_eager_version(ends, rows):
    from model.kernels.row_tiles_triton import tiles_of

    tiles = tiles_of(ends_of(*ends), rows)
    computed = [torch.arange(int(a), int(b)) for a, b in zip(tiles.first, tiles.end, strict=True)]
    covered = torch.cat(computed)
    assert torch.equal(covered, torch.arange(ends[-1]))
    number = torch.cat([torch.full_like(part, i) for i, part in enumerate(computed)])
    assert torch.equal(number, eager.tiles_of_groups(ends_of(*ends), rows)[: ends[-1]])
    counts = [-(-(end - start) // 128) for start, end in pairwise((0, *ends))]
    before = torch.tensor([0, *counts]).cumsum(0)
    assert torch.equal(tiles.before.long(), before)
    groups = torch.repeat_interleave(torch.arange(len(ends)), torch.tensor(counts))
    assert torch.equal(tiles.group[: len(groups)].long(), groups)


Three = tuple[Tensor, Tensor, Tensor]


def results(function: Callable[..., Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> Three:
    """Output and both gradients."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight)
    y.backward(grad)
    assert x.grad is not None and weight.grad is not None
    return y.detach(), x.grad, weight.grad


def grouped(ends: Tensor) -> Callable[..., Tensor]:
    from model.kernels.fp8 import matmul_triton

    return lambda x, weight: matmul_triton.grouped(x, weight, ends)


@functools.cache
def plain() -> Three:
    """The kernels' results on what `drawn` gives, for tests that compare others with them."""
    return results(grouped(ends_of(*ENDS)), *drawn())


def assert_same_results(computed: Three, live: int = ENDS[-1]) -> None:
    for number, (actual, other) in enumerate(zip(computed, plain(), strict=True)):
        some = slice(None) if number == 2 else slice(live)
        assert torch.equal(actual[some], other[some])


def exact(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Sums, Sums, Sums]:
    """Of one group: the three matmuls of rounded operands in float64."""
    rows, columns = (1, 128), (128, 1)
    w = eager.quantise_dequantise(weight, 128, 128).double()
    y = sums(eager.quantise_dequantise(x, *rows).double(), w.t())
    grad_x = sums(eager.quantise_dequantise(grad, *rows).double(), w)
    transposed = eager.quantise_dequantise(grad, *columns).double().t()
    return y, grad_x, sums(transposed, eager.quantise_dequantise(x, *columns).double())


def assert_close(computed: Tensor, expected: Sums, terms: int, result: float = 0.0) -> None:
    """fp32 sums of so many terms, each rounded by half of 2^-23, and the result by ``result``."""
    value, size = expected
    blocks = -(-terms // 128)
    allowed = (terms + blocks) * 2.0**-24 * size + result * value.abs()
    assert computed.shape == value.shape
    assert ((computed.double() - value).abs() <= allowed).all()


def assert_groups(
    computed: Three, drawn: Three, ends: tuple[int, ...], result: float = 0.0
) -> None:
    x, weight, grad = drawn
    y, grad_x, grad_weight = computed
    for group, (first, end) in enumerate(pairwise((0, *ends))):
        some = slice(first, end)
        of_group = exact(x[some], weight[group], grad[some])
        assert_close(y[some], of_group[0], x.shape[1], result)
        assert_close(grad_x[some], of_group[1], weight.shape[1], result)
        assert_close(grad_weight[group], of_group[2], end - first, result)


@interpreted
def test_grouped_rows_and_their_gradients():
    inputs, computed = drawn(), plain()
    assert_groups(computed, inputs, ENDS)
    assert computed[2][1].eq(0).all()
    for rows in computed[:2]:  # nothing is written after the last end
        assert rows[: ENDS[-1]].isfinite().all() and rows[ENDS[-1] :].isnan().all()
    x, weight, _ = inputs  # the negative control: rounding shows
    unrounded = x[:40].double() @ weight[0].double().t()
    assert (computed[0][:40] - unrounded).abs().max() > 1e-3 * unrounded.abs().max()


@interpreted
def test_bf16():
    """The interpreter cuts bits off where it makes bf16 numbers: a whole step, not half."""
    shapes = (70, 200), (1, 136, 200), (70, 136)
    inputs = tuple(spread(*shape, seed=i).bfloat16() for i, shape in enumerate(shapes))
    computed = results(grouped(ends_of(70)), *inputs)
    assert {t.dtype for t in computed} == {torch.bfloat16}
    assert_groups(computed, inputs, (70,), result=2.0**-7)


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 1, 1), (5, 7, 130), (131, 257, 3), (600, 3, 130)]
)
@interpreted
def test_one_group_of_any_size(rows, inputs, outputs):
    """600 rows are five tiles, the last alone in its band."""
    x, weight = spread(rows, inputs, seed=1), spread(1, outputs, inputs, seed=2)
    inputs = x, weight, spread(rows, outputs, seed=3)
    assert_groups(results(grouped(ends_of(rows)), *inputs), inputs, (rows,))


@interpreted
def test_no_rows():
    weight = spread(2, 136, 40, seed=1)
    empty = torch.zeros(0, 40), weight, torch.zeros(0, 136)
    y, grad_x, grad_weight = results(grouped(ends_of(0, 0)), *empty)
    assert y.shape == (0, 136) and grad_x.shape == (0, 40)
    assert grad_weight.eq(0).all()


@interpreted
def test_batched_is_every_group_by_itself():
    from model.kernels.fp8 import matmul_triton

    x, weight, grad = (
        spread(150, 2, 40, seed=1),
        spread(2, 9, 40, seed=2),
        spread(2, 150, 9, seed=3),
    )
    x = x.transpose(0, 1)  # as attention's heads come
    computed = results(matmul_triton.batched, x, weight, grad)
    for g in range(2):
        of_group = exact(x[g], weight[g], grad[g])
        for actual, other, terms in zip(computed, of_group, (40, 9, 150), strict=True):
            assert_close(actual[g], other, terms)


@interpreted
def test_a_gradient_that_is_no_row_after_row():
    x, weight, grad = drawn()
    for other in (grad.t().contiguous().t(), torch.cat([grad, grad], 1)[:, :OUTPUTS]):
        assert not other.is_contiguous()
        assert_same_results(results(grouped(ends_of(*ENDS)), x, weight, other))


@interpreted
def test_tiles_that_are_not_finite_are_nan_where_the_eager_version_s_are():
    inputs = drawn(poison=False)
    x, weight, grad = inputs
    x[50, 7], weight[3, 130, 190], grad[10, 3] = torch.inf, torch.nan, -torch.inf
    ends, live = ends_of(*ENDS), ENDS[-1]
    computed = results(grouped(ends), *inputs)
    expected = results(lambda x, w: eager.eager_grouped(x, w, ends), *inputs)
    for actual, other in zip(computed, expected, strict=True):
        actual, other = (t if t.dim() == 3 else t[:live] for t in (actual, other))
        assert torch.equal(actual.isnan(), other.isnan())
        assert 0 < int(actual.isnan().sum()) < actual.numel() / 2
        assert actual[~actual.isnan()].isfinite().all()


@interpreted
def test_large_numbers_meet_small_ones():
    """Scales of 2^117 and 2^-112: sums of codes times one of them would leave fp32's range."""
    x, weight, grad = rand(5, 140, seed=1), rand(1, 9, 140, seed=2), rand(5, 9, seed=3)
    x, weight, grad = x * 2.0**124, weight * 2.0**-105, grad * 2.0**100
    computed = results(grouped(ends_of(5)), x, weight, grad)
    of_group = exact(x, weight[0], grad)
    assert_close(computed[0], of_group[0], 140)
    assert_close(computed[1], of_group[1], 9)


@interpreted
def test_only_the_gradient_that_is_wanted():
    x, weight, grad = drawn()
    for index in (0, 1):
        leaves = [x.clone(), weight.clone()]
        leaves[index].requires_grad_()
        out = grouped(ends_of(*ENDS))(*leaves)
        (computed,) = torch.autograd.grad(out, leaves[index], grad)
        live = slice(ENDS[-1]) if index == 0 else slice(None)
        assert torch.equal(computed[live], plain()[1 + index][live])


@interpreted
def test_what_is_saved_is_what_came():
    """Also where it is a view: saved as such, not as a copy of it."""
    from model.kernels.fp8 import matmul_triton

    x, weight = spread(3, 2, 40, seed=1).transpose(0, 1), spread(2, 9, 40, seed=2)
    leaves = x.requires_grad_(), weight.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        matmul_triton.batched(*leaves)
    assert [t.data_ptr() for t in saved[:2]] == [t.data_ptr() for t in leaves]
    assert saved[0].stride() == x.stride() and [t.numel() for t in saved[2:]] == [2]


@interpreted
def test_the_order_of_programs_changes_no_bit():
    with last_program_first():
        assert_same_results(results(grouped(ends_of(*ENDS)), *drawn()))


@interpreted
def test_linears_and_experts_use_what_was_chosen():
    """The results are Triton's, to the bit, for every caller."""
    from model.kernels.fp8 import matmul_triton

    x, weight, grad = spread(2, 70, 40, seed=1), spread(9, 40, seed=2), spread(2, 70, 9, seed=3)
    ends, inputs = ends_of(*ENDS), drawn()
    matmuls = fp8_matmuls(Choice("triton"))
    as_linear = results(matmuls.linear, x, weight, grad)
    as_experts = results(lambda x, w: matmuls.grouped(x, w, ends), *inputs)
    rows = x.view(1, 140, 40), weight[None], grad.view(1, 140, 9)
    for actual, other in zip(as_linear, results(matmul_triton.batched, *rows), strict=True):
        assert torch.equal(actual.flatten(), other.flatten())
    assert_same_results(as_experts)
    plain_results = eager.eager_grouped(inputs[0], inputs[1], ends)[: ENDS[-1]]
    assert not torch.equal(as_experts[0][: ENDS[-1]], plain_results)  # or it says nothing
