"""Matmuls in FP8 on Hopper's tensor cores; ``quantise_triton.py`` quantises their operands.

torch's `scaled_mm` supports these scales on Hopper, for a single group whose sizes are multiples of
128; its `scaled_grouped_mm` does not, and neither runs without a GPU: so all three matmuls are
here, grouped, and a linear is one group (`make bench-gpu` also times `scaled_mm`).

The tensor cores accumulate E4M3 products with about 14 bits (V3 §3.3.2). So each partial sum of 128
products starts from zero, is scaled by both tiles' scales and added in fp32 outside of the tensor
cores. Where a product of two scales leaves fp32's range, above 2^127 or below 2^-149, so do the
results.

No group's size is read from the device: there are as many programs as there may be tiles of 128
rows, and the surplus ones exit at once. For backward, x and the weight are saved unquantised: a
norm's output is one tensor that several linears save, while codes would be one for each of them.

Roofline bounds for Flash's 6 routed experts of three matrices of 2048 x 4096, on an H100: matmuls
at 1979 TFLOP/s (989 in bf16); quantisation at 3.35 TB/s, 3 bytes per element of x and 4 of a
gradient, which is read once for both of its matmuls. Weights are quantised again for every matmul,
3 bytes per element: 22 µs per expert forward and as much backward, which pays off from 1,400 rows
per expert on, backward from 700.

    ns per token    bf16    matmuls   quantising x and dy   measured
    forward          305        153                    55   not yet timed
    backward         610        305                   114   not yet timed

G groups of T tokens; P rows of E experts; F and X a weight's outputs and inputs; N tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels import backend
from model.kernels.block_sizes import FP8_BLOCK as BLOCK
from model.kernels.fp8.quantise_triton import Codes, quantise, quantise_weight
from model.kernels.row_tiles_triton import Tiles, tiles_of

_BAND = 8
"""Row tiles whose programs have adjacent ids, so that they share operands in L2."""


def batched(x_GTX: Tensor, weight_GFX: Tensor) -> Tensor:
    """Computes ``model.kernels.fp8.batched`` in Triton.

    Raises:
        UnsupportedError: a GPU cannot run this device or dtype.
    """
    backend.fp8(x_GTX.device, x_GTX.dtype)
    groups, tokens, _ = x_GTX.shape
    ends_G = torch.arange(1, groups + 1, dtype=torch.int32, device=x_GTX.device) * tokens
    return _Matmuls.apply(x_GTX, weight_GFX, ends_G)


def grouped(x_PX: Tensor, weight_EFX: Tensor, ends_E: Tensor) -> Tensor:
    """Computes ``model.kernels.fp8.grouped`` in Triton.

    Raises:
        UnsupportedError: a GPU cannot run this device or dtype.
    """
    backend.fp8(x_PX.device, x_PX.dtype)
    return _Matmuls.apply(x_PX, weight_EFX, ends_E)


class _Matmuls(torch.autograd.Function):
    """All three matmuls of x [P, X], or of [E, T, X] with T rows per group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        tiles = tiles_of(ends, x.shape[:-1].numel())
        rows, _ = quantise(x, tiles, rows=True, columns=False)
        out = x.new_empty(*x.shape[:-1], weight.shape[1])
        return matmul_into(out, rows, quantise_weight(weight, transposed=False), tiles)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        tiles = tiles_of(ends, x.shape[:-1].numel())
        rows, columns = quantise(grad, tiles, rows=needs_x, columns=needs_weight)
        grad_x = grad_weight = None
        if needs_x:
            transposed = quantise_weight(weight, transposed=True)
            grad_x = matmul_into(x.new_empty(x.shape), rows, transposed, tiles)
        if needs_weight:
            _, x_columns = quantise(x, tiles, rows=False, columns=True)
            out = weight.new_empty(weight.shape)
            grad_weight = weight_gradient_into(out, columns, x_columns, tiles)
        return grad_x, grad_weight, None


def matmul_into(out: Tensor, rows: Codes, weight: Codes, tiles: Tiles) -> Tensor:
    """Multiplies every tile of rows [P, X] by its group's matrix [F, X], transposed, into ``out``.

    ``out`` is contiguous and has P rows of F elements, whatever its dims. For the gradient of x,
    X and F change places.
    """
    height, width = rows.codes.shape[0], out.shape[-1]
    count, columns = len(tiles.first), triton.cdiv(width, BLOCK)
    _matmul[(count * columns,)](
        *rows,
        *weight,
        out,
        tiles.group,
        tiles.first,
        tiles.end,
        height,
        width,
        rows.codes.shape[1] // BLOCK,
        count,
        BAND=_BAND,
        BLOCK=BLOCK,
        num_warps=8,
        num_stages=4,
    )
    return out


def weight_gradient_into(out_EFX: Tensor, grad: Codes, x: Codes, tiles: Tiles) -> Tensor:
    """Sums over every group's tiles grad [N, F, 128] times x [N, X, 128], into ``out``."""
    experts, height, width = out_EFX.shape
    right = triton.cdiv(width, BLOCK)
    _weight_gradient[(triton.cdiv(height, BLOCK) * right, experts)](
        *grad,
        *x,
        out_EFX,
        tiles.before,
        height,
        width,
        right,
        BLOCK=BLOCK,
        num_warps=8,
        num_stages=4,
    )
    return out_EFX


@triton.jit(do_not_specialize=["tiles"])
def _matmul(
    a,
    a_scales,
    b,
    b_scales,
    out,
    tile_group,
    tile_first,
    tile_end,
    rows,
    width,
    blocks,
    tiles,
    BAND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.cdiv(width, BLOCK)
    band, index = tl.program_id(0) // (BAND * columns), tl.program_id(0) % (BAND * columns)
    high = tl.minimum(tiles - band * BAND, BAND)
    tile, column = band * BAND + index % high, index // high
    first, end = tl.load(tile_first + tile), tl.load(tile_end + tile)
    if first == end:
        return
    group = tl.load(tile_group + tile).to(tl.int64)
    k = tl.arange(0, BLOCK)
    row, n = first + tl.arange(0, BLOCK), column * BLOCK + tl.arange(0, BLOCK)
    in_bounds, inside = row < end, n < width
    a_at = a + row.to(tl.int64)[:, None] * (blocks * BLOCK) + k[None, :]
    b_at = b + (group * width + n)[:, None] * (blocks * BLOCK) + k[None, :]
    a_scale = a_scales + row
    b_scale = b_scales + (group * columns + column) * blocks
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in tl.range(0, blocks):
        x = tl.load(a_at, mask=in_bounds[:, None], other=0.0)
        w = tl.load(b_at, mask=inside[:, None], other=0.0)
        scale = tl.load(a_scale, mask=in_bounds, other=0.0) * tl.load(b_scale)
        acc += tl.dot(x, tl.trans(w)) * scale[:, None]
        a_at += BLOCK
        b_at += BLOCK
        a_scale += rows
        b_scale += 1
    at = row.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=in_bounds[:, None] & inside[None, :])


@triton.jit
def _weight_gradient(
    a,
    a_scales,
    b,
    b_scales,
    out,
    before,
    rows,
    columns,
    right,
    BLOCK: tl.constexpr,
):
    expert = tl.program_id(1)
    i, j = tl.program_id(0) // right, tl.program_id(0) % right
    k = tl.arange(0, BLOCK)
    row, column = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    in_bounds, inside = row < rows, column < columns
    tile, end = tl.load(before + expert), tl.load(before + expert + 1)
    a_line, b_line = tile.to(tl.int64) * rows + row, tile.to(tl.int64) * columns + column
    a_at = a_line[:, None] * BLOCK + k[None, :]
    b_at = b_line[:, None] * BLOCK + k[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in tl.range(tile, end):
        y = tl.load(a + a_at, mask=in_bounds[:, None], other=0.0)
        x = tl.load(b + b_at, mask=inside[:, None], other=0.0)
        y_scale = tl.load(a_scales + a_line, mask=in_bounds, other=0.0)
        x_scale = tl.load(b_scales + b_line, mask=inside, other=0.0)
        acc += tl.dot(y, tl.trans(x)) * (y_scale[:, None] * x_scale[None, :])
        a_line += rows
        b_line += columns
        a_at += rows * BLOCK
        b_at += columns * BLOCK
    at = (expert.to(tl.int64) * rows + row)[:, None] * columns + column[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=in_bounds[:, None] & inside[None, :])
