"""The mixing of residual streams in Triton, what is read from them and written to them, and back.

``streams_triton.py`` has the plan. Forward divides the columns over programs; backward has
all columns of a few tokens in one, because its sums run over D.

T tokens; N streams; D their width; X = N·D; w = N(N+2) coefficients, or N of the head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_FEW = 4
"""Tokens of a program."""
_MIXED = 512
"""Columns of D that are mixed at once."""


@triton.jit
def _streams_tile(x, own, live, d, dim, N: tl.constexpr):
    """fp32 [BLOCK_T, N, BLOCK_D] of an array [T, N, dim]."""
    row = own[:, None] * N + tl.arange(0, N)[None, :]
    mask = live[:, None, None] & (d < dim)[None, None, :]
    at = row[:, :, None] * dim + d[None, None, :]
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _mix(
    streams,
    pre,
    read,
    tokens,
    dim,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = token < tokens
    own = token.to(tl.int64)
    n = tl.arange(0, N)[None, :]
    share = tl.load(pre + own[:, None] * N + n, mask=live[:, None], other=0.0)
    mixed = tl.sum(share[:, :, None] * _streams_tile(streams, own, live, d, dim, N), 1)
    mask = live[:, None] & (d < dim)[None, :]
    tl.store(read + own[:, None] * dim + d[None, :], mixed.to(read.dtype.element_ty), mask=mask)


@triton.jit
def _write(
    streams,
    y,
    post,
    comb,
    out,
    tokens,
    dim,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = token < tokens
    mask = live[:, None] & (d < dim)[None, :]
    own = token.to(tl.int64)
    n = tl.arange(0, N)[None, :]
    added = tl.load(y + own[:, None] * dim + d[None, :], mask=mask, other=0.0).to(tl.float32)
    x = _streams_tile(streams, own, live, d, dim, N)
    for k in tl.static_range(N):
        at = comb + (own[:, None] * N + n) * N + k
        share = tl.load(at, mask=live[:, None], other=0.0)
        of_y = tl.load(post + own * N + k, mask=live, other=0.0)
        mixed = tl.sum(share[:, :, None] * x, 1) + of_y[:, None] * added
        at = out + (own * N + k)[:, None] * dim + d[None, :]
        tl.store(at, mixed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _write_back(
    streams,
    y,
    post,
    comb,
    grad_out,
    grad_streams,
    grad_y,
    grad_post,
    grad_comb,
    tokens,
    dim,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = token < tokens
    own = token.to(tl.int64)
    n = tl.arange(0, N)
    at_post = own[:, None] * N + n[None, :]
    share_y = tl.load(post + at_post, mask=live[:, None], other=0.0)
    sum_post = tl.zeros((BLOCK_T, N), tl.float32)
    sum_comb = tl.zeros((BLOCK_T, N, N), tl.float32)
    for start in tl.range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = live[:, None] & (d < dim)[None, :]
        at = own[:, None] * dim + d[None, :]
        added = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        grad = _streams_tile(grad_out, own, live, d, dim, N)
        of_y = tl.sum(share_y[:, :, None] * grad, 1)
        tl.store(grad_y + at, of_y.to(grad_y.dtype.element_ty), mask=mask)
        sum_post += tl.sum(grad * added[:, None, :], 2)
        for j in tl.static_range(N):
            wide = (own * N + j)[:, None] * dim + d[None, :]
            x = tl.load(streams + wide, mask=mask, other=0.0).to(tl.float32)
            at_row = comb + (own * N + j)[:, None] * N + n[None, :]
            share = tl.load(at_row, mask=live[:, None], other=0.0)
            of_x = tl.sum(share[:, :, None] * grad, 1)
            tl.store(grad_streams + wide, of_x.to(grad_streams.dtype.element_ty), mask=mask)
            along = tl.sum(grad * x[:, None, :], 2)
            sum_comb += tl.where((n == j)[None, :, None], along[:, None, :], 0.0)
    tl.store(grad_post + at_post, sum_post, mask=live[:, None])
    at_comb = (own[:, None, None] * N + n[None, :, None]) * N + n[None, None, :]
    tl.store(grad_comb + at_comb, sum_comb, mask=live[:, None, None])


@triton.jit
def _mix_back(
    streams,
    grad_read,
    grad_pre,
    tokens,
    dim,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = token < tokens
    own = token.to(tl.int64)
    acc = tl.zeros((BLOCK_T, N), tl.float32)
    for start in tl.range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = live[:, None] & (d < dim)[None, :]
        grad = tl.load(grad_read + own[:, None] * dim + d[None, :], mask=mask, other=0.0)
        x = _streams_tile(streams, own, live, d, dim, N)
        acc += tl.sum(x * grad.to(tl.float32)[:, None, :], 2)
    at = own[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(grad_pre + at, acc, mask=live[:, None])


def mix(streams: Tensor, pre: Tensor) -> Tensor:
    """Σ_j pre_j X_j, [T, D] in the streams' dtype."""
    tokens, count, dim = streams.shape
    read = streams.new_empty(tokens, dim)
    if tokens:
        _mix[_grid(tokens, dim)](streams, pre, read, tokens, dim, **_sizes(count))
    return read


def mix_back(streams: Tensor, grad_read: Tensor) -> Tensor:
    """The gradient of pre, fp32 [T, N]; that of X is part of `project_back`."""
    tokens, count, dim = streams.shape
    grad_pre = torch.empty((tokens, count), dtype=torch.float32, device=streams.device)
    if tokens:
        _mix_back[(triton.cdiv(tokens, _FEW),)](
            streams, grad_read, grad_pre, tokens, dim, **_sizes(count)
        )
    return grad_pre


def write(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """post_k y + Σ_j comb_jk X_j, [T, N, D] in the streams' dtype."""
    tokens, count, dim = streams.shape
    out = torch.empty_like(streams)
    if tokens:
        _write[_grid(tokens, dim)](streams, y, post, comb, out, tokens, dim, **_sizes(count))
    return out


def write_back(
    streams: Tensor, y: Tensor, post: Tensor, comb: Tensor, grad_out: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of X, y, post and comb."""
    tokens, count, dim = streams.shape
    grads = tuple(torch.empty_like(x) for x in (streams, y, post, comb))
    if tokens:
        _write_back[(triton.cdiv(tokens, _FEW),)](
            streams, y, post, comb, grad_out, *grads, tokens, dim, **_sizes(count)
        )
    return grads


def _grid(tokens: int, dim: int) -> tuple[int, int]:
    return triton.cdiv(tokens, _FEW), triton.cdiv(dim, _MIXED)


def _sizes(streams: int) -> dict[str, int]:
    return {"N": streams, "BLOCK_T": _FEW, "BLOCK_D": _MIXED, "num_warps": 4}
