"""The projection of hyper-connections in Triton: X times fnᵀ with Σ X², and its gradients.

``streams_triton.py`` has the plan. An fp32 factor of a matmul is the sum of two that TF32
holds: 22 bits, against 8 of a bf16 one.

T tokens; N streams; D their width; X = N·D; w = N(N+2) coefficients, or N of the head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS, _BACK_TOKENS, _COLUMNS = 64, 32, 64
"""Tokens and columns of a tile of matmuls, as large as fits into registers."""
_PROGRAMS = 264
"""Two for each multiprocessor; with fewer blocks than that, the work of one is divided."""


@triton.jit
def _halves(x):
    """fp32 as a sum of two numbers whose bits TF32 has (of the second all but the last two)."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _project(
    streams,
    fn,
    part_w,
    part_square,
    tokens,
    width,
    span,
    OUT: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """``span`` of the ``width`` columns: their part of X · fnᵀ [T, OUT] and of Σ X² [T]."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(1)
    live = token < tokens
    out = tl.arange(0, BLOCK_W)
    acc = tl.zeros((BLOCK_T, BLOCK_W), tl.float32)
    square = tl.zeros((BLOCK_T,), tl.float32)
    end = tl.minimum((part + 1) * span, width)
    for start in tl.range(part * span, end, BLOCK_X):
        column = start + tl.arange(0, BLOCK_X)
        inside = column < end
        at = token.to(tl.int64)[:, None] * width + column[None, :]
        x = tl.load(streams + at, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        at = out[:, None] * width + column[None, :]
        f = tl.load(fn + at, mask=(out < OUT)[:, None] & inside[None, :], other=0.0)
        high, low = _halves(f)
        acc = tl.dot(x, tl.trans(high), acc, input_precision="tf32")
        acc = tl.dot(x, tl.trans(low), acc, input_precision="tf32")
        square += tl.sum(x * x, 1)
    row = part.to(tl.int64) * tokens + token
    tl.store(part_square + row, square, mask=live)
    tl.store(
        part_w + row[:, None] * OUT + out[None, :], acc, mask=live[:, None] & (out < OUT)[None, :]
    )


@triton.jit
def _project_back(
    streams,
    fn,
    grad_w,
    along,
    pre,
    grad_read,
    grad_streams,
    grad_fn,
    tokens,
    dim,
    span,
    N: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Columns of one stream, ``span`` tokens: X's gradient, and their part of fn's [OUT, N·D]."""
    blocks = tl.cdiv(dim, BLOCK_X)
    j = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BLOCK_X + tl.arange(0, BLOCK_X)
    part = tl.program_id(1)
    inside = d < dim
    width = N * dim
    column = j * dim + d
    out = tl.arange(0, BLOCK_W)
    at = out[:, None] * width + column[None, :]
    shown = (out < OUT)[:, None] & inside[None, :]
    f_high, f_low = _halves(tl.load(fn + at, mask=shown, other=0.0))
    acc = tl.zeros((BLOCK_W, BLOCK_X), tl.float32)
    end = tl.minimum((part + 1) * span, tokens)
    for start in tl.range(part * span, end, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        live = token < end
        own = token.to(tl.int64)
        mask = live[:, None] & inside[None, :]
        wide = own[:, None] * width + column[None, :]
        x = tl.load(streams + wide, mask=mask, other=0.0).to(tl.float32)
        known = live[:, None] & (out < OUT)[None, :]
        g = tl.load(grad_w + own[:, None] * OUT + out[None, :], mask=known, other=0.0)
        read = tl.load(grad_read + own[:, None] * dim + d[None, :], mask=mask, other=0.0)
        share = tl.load(pre + own * N + j, mask=live, other=0.0)
        less = tl.load(along + token, mask=live, other=0.0)
        g_high, g_low = _halves(g)
        grad = tl.dot(g_low, f_high, input_precision="tf32")
        grad = tl.dot(g_high, f_low, grad, input_precision="tf32")
        grad = tl.dot(g_high, f_high, grad, input_precision="tf32")
        grad += share[:, None] * read.to(tl.float32) - less[:, None] * x
        tl.store(grad_streams + wide, grad.to(grad_streams.dtype.element_ty), mask=mask)
        acc = tl.dot(tl.trans(g_high), x, acc, input_precision="tf32")
        acc = tl.dot(tl.trans(g_low), x, acc, input_precision="tf32")
    tl.store(grad_fn + part.to(tl.int64) * OUT * width + at, acc, mask=shown)


def project(streams: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
    """X · fnᵀ [parts, T, w] and Σ X² [parts, T], fp32, of equal parts of the columns.

    Args:
        streams: [T, N, D].
        fn: fp32 [w, N·D].
    """
    tokens, count, dim = streams.shape
    out, width = len(fn), count * dim
    rows = triton.cdiv(tokens, _TOKENS)
    parts = min(max(_PROGRAMS // max(rows, 1), 1), triton.cdiv(width, _COLUMNS))
    span = triton.cdiv(triton.cdiv(width, parts), _COLUMNS) * _COLUMNS
    parts = triton.cdiv(width, span)
    part_w, part_square = fn.new_empty(parts, tokens, out), fn.new_empty(parts, tokens)
    if tokens:
        _project[(rows, parts)](
            streams,
            fn,
            part_w,
            part_square,
            tokens,
            width,
            span,
            OUT=out,
            BLOCK_W=block_of(out),
            BLOCK_T=_TOKENS,
            BLOCK_X=_COLUMNS,
            num_warps=8,
            num_stages=3,
        )
    return part_w, part_square


def project_back(
    streams: Tensor, fn: Tensor, grad_w: Tensor, along: Tensor, pre: Tensor, grad_read: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of X, with the parts that the weighted read and the norm have in it, and of fn.

    Args:
        grad_w: fp32 [T, w], of the projections before the norm's factor.
        along: fp32 [T], what the norm takes off X's gradient for each X.
        pre, grad_read: [T, N] and [T, D], of x = Σ pre_j X_j.
    """
    tokens, count, dim = streams.shape
    out = len(fn)
    chunks = count * triton.cdiv(dim, _COLUMNS)
    parts = min(max(_PROGRAMS // chunks, 1), max(triton.cdiv(tokens, _TOKENS), 1))
    span = max(triton.cdiv(triton.cdiv(tokens, parts), _BACK_TOKENS), 1) * _BACK_TOKENS
    parts = triton.cdiv(tokens, span)
    grad_streams, grad_fn = torch.empty_like(streams), fn.new_empty(parts, out, count * dim)
    if tokens:
        _project_back[(chunks, parts)](
            streams,
            fn,
            grad_w,
            along,
            pre,
            grad_read,
            grad_streams,
            grad_fn,
            tokens,
            dim,
            span,
            N=count,
            OUT=out,
            BLOCK_W=block_of(out),
            BLOCK_T=_BACK_TOKENS,
            BLOCK_X=_COLUMNS,
            num_warps=4,
            num_stages=2,
        )
    return grad_streams, grad_fn.sum(0)


def block_of(out: int) -> int:
    """Columns of a tile that holds w projections; the tensor cores take no fewer than 16."""
    return max(triton.next_power_of_2(out), 16)
