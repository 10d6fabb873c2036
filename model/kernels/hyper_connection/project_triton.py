"""The projection of hyper-connections in Triton: X times fnᵀ with Σ X², and its gradients.

``streams_triton.py`` has the plan. An fp32 operand is split into two TF32 numbers (22 bits in all;
a bf16 operand has 8).

T tokens; N streams; D their width; M = (2+N)·N coefficients, or N of them in the head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS, _BACKWARD_TOKENS, _COLUMNS = 64, 32, 64
"""Tokens (forward, backward) and columns of a matmul tile, as large as fits into registers."""
_PROGRAMS = 264
"""Two per SM; with fewer blocks than that, each block's work is split over several programs."""


@triton.jit
def _split_tf32(x):
    """Splits fp32 into high + low: high is exact in TF32, low to within its last two bits."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit(do_not_specialize=["tokens"])
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
    """Computes partial sums over ``span`` of the columns: X · fnᵀ [T, OUT] and Σ X² [T]."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(1)
    in_bounds = token < tokens
    out = tl.arange(0, BLOCK_W)
    acc = tl.zeros((BLOCK_T, BLOCK_W), tl.float32)
    square = tl.zeros((BLOCK_T,), tl.float32)
    end = tl.minimum((part + 1) * span, width)
    for start in tl.range(part * span, end, BLOCK_X):
        column = start + tl.arange(0, BLOCK_X)
        inside = column < end
        at = token.to(tl.int64)[:, None] * width + column[None, :]
        x = tl.load(streams + at, mask=in_bounds[:, None] & inside[None, :], other=0.0).to(
            tl.float32
        )
        at = out[:, None] * width + column[None, :]
        f = tl.load(fn + at, mask=(out < OUT)[:, None] & inside[None, :], other=0.0)
        high, low = _split_tf32(f)
        acc = tl.dot(x, tl.trans(high), acc, input_precision="tf32")
        acc = tl.dot(x, tl.trans(low), acc, input_precision="tf32")
        square += tl.sum(x * x, 1)
    row = part.to(tl.int64) * tokens + token
    tl.store(part_square + row, square, mask=in_bounds)
    tl.store(
        part_w + row[:, None] * OUT + out[None, :],
        acc,
        mask=in_bounds[:, None] & (out < OUT)[None, :],
    )


@triton.jit(do_not_specialize=["tokens"])
def _project_backward(
    streams,
    fn,
    grad_w,
    norm_term,
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
    """Computes gradients for a block of columns of one stream over ``span`` tokens.

    Writes X's gradient, and these tokens' partial sum of fn's [OUT, N·D].
    """
    blocks = tl.cdiv(dim, BLOCK_X)
    j = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BLOCK_X + tl.arange(0, BLOCK_X)
    part = tl.program_id(1)
    inside = d < dim
    width = N * dim
    column = j * dim + d
    out = tl.arange(0, BLOCK_W)
    at = out[:, None] * width + column[None, :]
    fn_mask = (out < OUT)[:, None] & inside[None, :]
    f_high, f_low = _split_tf32(tl.load(fn + at, mask=fn_mask, other=0.0))
    acc = tl.zeros((BLOCK_W, BLOCK_X), tl.float32)
    end = tl.minimum((part + 1) * span, tokens)
    for start in tl.range(part * span, end, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        in_bounds = token < end
        own = token.to(tl.int64)
        mask = in_bounds[:, None] & inside[None, :]
        wide = own[:, None] * width + column[None, :]
        x = tl.load(streams + wide, mask=mask, other=0.0).to(tl.float32)
        w_mask = in_bounds[:, None] & (out < OUT)[None, :]
        g = tl.load(grad_w + own[:, None] * OUT + out[None, :], mask=w_mask, other=0.0)
        read = tl.load(grad_read + own[:, None] * dim + d[None, :], mask=mask, other=0.0)
        pre_weight = tl.load(pre + own * N + j, mask=in_bounds, other=0.0)
        term = tl.load(norm_term + token, mask=in_bounds, other=0.0)
        g_high, g_low = _split_tf32(g)
        grad = tl.dot(g_low, f_high, input_precision="tf32")
        grad = tl.dot(g_high, f_low, grad, input_precision="tf32")
        grad = tl.dot(g_high, f_high, grad, input_precision="tf32")
        grad += pre_weight[:, None] * read.to(tl.float32) - term[:, None] * x
        tl.store(grad_streams + wide, grad.to(grad_streams.dtype.element_ty), mask=mask)
        acc = tl.dot(tl.trans(g_high), x, acc, input_precision="tf32")
        acc = tl.dot(tl.trans(g_low), x, acc, input_precision="tf32")
    tl.store(grad_fn + part.to(tl.int64) * OUT * width + at, acc, mask=fn_mask)


def project(streams: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
    """Computes partial sums over equal parts of the columns, fp32.

    Returns X · fnᵀ [parts, T, M] and Σ X² [parts, T].

    Args:
        streams: [T, N, D].
        fn: fp32 [M, N·D].
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


def project_backward(
    streams: Tensor, fn: Tensor, grad_w: Tensor, norm_term: Tensor, pre: Tensor, grad_read: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of X, including the terms from weighted read and norm, and of fn.

    Args:
        grad_w: fp32 [T, M], of the projections before their multiplication with 1 / rms.
        norm_term: fp32 [T], coefficient c of the norm's term: X's gradient gets -c · X.
        pre, grad_read: [T, N] and [T, D], of x = Σ pre_j X_j.
    """
    tokens, count, dim = streams.shape
    out = len(fn)
    chunks = count * triton.cdiv(dim, _COLUMNS)
    parts = min(max(_PROGRAMS // chunks, 1), max(triton.cdiv(tokens, _TOKENS), 1))
    span = max(triton.cdiv(triton.cdiv(tokens, parts), _BACKWARD_TOKENS), 1) * _BACKWARD_TOKENS
    parts = triton.cdiv(tokens, span)
    grad_streams, grad_fn = torch.empty_like(streams), fn.new_empty(parts, out, count * dim)
    if tokens:
        _project_backward[(chunks, parts)](
            streams,
            fn,
            grad_w,
            norm_term,
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
            BLOCK_T=_BACKWARD_TOKENS,
            BLOCK_X=_COLUMNS,
            num_warps=4,
            num_stages=2,
        )
    return grad_streams, grad_fn.sum(0)


def block_of(out: int) -> int:
    """Returns the columns of a tile that holds M projections; tensor cores need at least 16."""
    return max(triton.next_power_of_2(out), 16)
