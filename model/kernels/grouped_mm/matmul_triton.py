"""Matmuls of groups of rows in Triton, in bf16 or fp16 with fp32 sums, on any of NVIDIA's GPUs.

No group's size is read from the device: there are as many programs as there may be tiles of 128
rows, and the surplus ones exit at once. torch's own kernel, where there is one, is expected to be
faster (CUTLASS with TMA); elsewhere torch multiplies group by group, and waits for the device once
for each of the three matmuls.

Roofline bounds for Flash's 6 routed experts of three matrices of 2048 x 4096: 302 MFLOP a token
forward and twice that backward, 0.97 and 1.94 µs at an A100's 312 TFLOP/s. None has been timed.

P rows of E groups; X and Y a matrix's inputs and outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels import backend
from model.kernels.row_tiles_triton import BLOCK, Tiles, tiles_of

_BAND = 8
"""Row tiles whose programs have adjacent ids, so that they share a matrix's columns in L2."""
STAGES = 3
"""Tiles in flight: with 128 x 64 of both operands 98,304 bytes, which every GPU has."""


def grouped_mm(x_PX: Tensor, weight_EYX: Tensor, ends_E: Tensor, *, stages: int = STAGES) -> Tensor:
    """Computes ``model.kernels.grouped_mm.grouped_mm`` in Triton.

    Raises:
        UnsupportedError: a GPU cannot run this device or dtype.
    """
    backend.grouped_mm(x_PX.device, x_PX.dtype)
    return _GroupedMM.apply(x_PX, weight_EYX, ends_E, stages)


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, stages: int) -> Tensor:
        ctx.stages = stages
        ctx.save_for_backward(x, weight, ends)
        return _rows(x, weight.transpose(1, 2), tiles_of(ends, len(x)), stages)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _rows(grad, weight, tiles_of(ends, len(x)), ctx.stages)
        if ctx.needs_input_grad[1]:
            grad_weight = _outer(grad, x, ends, ctx.stages)
        return grad_x, grad_weight, None, None


def _rows(a: Tensor, matrices: Tensor, tiles: Tiles, stages: int) -> Tensor:
    """Multiplies the rows of every tile, [P, K], by its group's matrix, [E, K, N]."""
    a = a.contiguous()
    (rows, length), width = a.shape, matrices.shape[2]
    out = a.new_empty(rows, width)
    count, columns = len(tiles.first), triton.cdiv(width, BLOCK)
    _rows_by_matrix[(count * columns,)](
        a,
        matrices,
        out,
        tiles.group,
        tiles.first,
        tiles.end,
        length,
        width,
        *matrices.stride(),
        count,
        BAND=_BAND,
        BLOCK=BLOCK,
        BLOCK_K=BLOCK // 2,
        num_warps=8,
        num_stages=stages,
    )
    return out


def _outer(grad: Tensor, x: Tensor, ends: Tensor, stages: int) -> Tensor:
    """Sums grad [P, Y] times x [P, X] over the rows of every group, [E, Y, X]."""
    grad, x = grad.contiguous(), x.contiguous()
    height, width = grad.shape[1], x.shape[1]
    out = x.new_empty(len(ends), height, width)
    right = triton.cdiv(width, BLOCK)
    _rows_by_rows[(triton.cdiv(height, BLOCK) * right, len(ends))](
        grad,
        x,
        out,
        ends,
        height,
        width,
        right,
        BLOCK=BLOCK,
        BLOCK_K=BLOCK // 2,
        num_warps=8,
        num_stages=stages,
    )
    return out


@triton.jit(do_not_specialize=["tiles"])
def _rows_by_matrix(
    a,
    b,
    out,
    tile_group,
    tile_first,
    tile_end,
    length,
    width,
    stride_e,
    stride_k,
    stride_n,
    tiles,
    BAND: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = tl.cdiv(width, BLOCK)
    band, index = tl.program_id(0) // (BAND * columns), tl.program_id(0) % (BAND * columns)
    high = tl.minimum(tiles - band * BAND, BAND)
    tile, column = band * BAND + index % high, index // high
    first, end = tl.load(tile_first + tile), tl.load(tile_end + tile)
    if first == end:
        return
    group = tl.load(tile_group + tile).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    row, n = first + tl.arange(0, BLOCK), column * BLOCK + tl.arange(0, BLOCK)
    in_bounds, inside = row < end, n < width
    a_at = a + row.to(tl.int64)[:, None] * length + k[None, :]
    b_at = b + group * stride_e + k[:, None] * stride_k + n[None, :].to(tl.int64) * stride_n
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in tl.range(0, length, BLOCK_K):
        there = k < length - start
        x = tl.load(a_at, mask=in_bounds[:, None] & there[None, :], other=0.0)
        w = tl.load(b_at, mask=there[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        a_at += BLOCK_K
        b_at += BLOCK_K * stride_k
    at = row.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=in_bounds[:, None] & inside[None, :])


@triton.jit
def _rows_by_rows(
    a,
    b,
    out,
    ends,
    height,
    width,
    right,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    group = tl.program_id(1)
    i, j = tl.program_id(0) // right, tl.program_id(0) % right
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    end = tl.load(ends + group)
    k = tl.arange(0, BLOCK_K)
    row, column = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    in_bounds, inside = row < height, column < width
    place = (start + k).to(tl.int64)
    a_at = a + place[None, :] * height + row[:, None]
    b_at = b + place[:, None] * width + column[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in tl.range(start, end, BLOCK_K):
        there = k < end - first
        y = tl.load(a_at, mask=in_bounds[:, None] & there[None, :], other=0.0)
        x = tl.load(b_at, mask=there[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(y, x, acc, input_precision="ieee")
        a_at += BLOCK_K * height
        b_at += BLOCK_K * width
    at = (group.to(tl.int64) * height + row)[:, None] * width + column[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=in_bounds[:, None] & inside[None, :])
