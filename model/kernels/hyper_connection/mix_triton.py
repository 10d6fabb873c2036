"""Reading from and writing to the residual streams in Triton, forward and backward.

``streams_triton.py`` has the plan. Forward divides the columns over programs; in backward a program
has all columns of a few tokens, because its sums run over D.

T tokens; N streams; D their width; M = (2+N)·N coefficients, or N of them in the head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_T = 4
"""Tokens per program."""
_BLOCK_D = 512
"""Columns of D processed at once."""


@triton.jit
def _streams_tile(x, own, in_bounds, d, dim, N: tl.constexpr):
    """Loads a tile [BLOCK_T, N, BLOCK_D] of an array [T, N, dim] as fp32."""
    row = own[:, None] * N + tl.arange(0, N)[None, :]
    mask = in_bounds[:, None, None] & (d < dim)[None, None, :]
    at = row[:, :, None] * dim + d[None, None, :]
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
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
    in_bounds = token < tokens
    own = token.to(tl.int64)
    n = tl.arange(0, N)[None, :]
    weight = tl.load(pre + own[:, None] * N + n, mask=in_bounds[:, None], other=0.0)
    mixed = tl.sum(weight[:, :, None] * _streams_tile(streams, own, in_bounds, d, dim, N), 1)
    mask = in_bounds[:, None] & (d < dim)[None, :]
    tl.store(read + own[:, None] * dim + d[None, :], mixed.to(read.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
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
    in_bounds = token < tokens
    mask = in_bounds[:, None] & (d < dim)[None, :]
    own = token.to(tl.int64)
    n = tl.arange(0, N)[None, :]
    y_tile = tl.load(y + own[:, None] * dim + d[None, :], mask=mask, other=0.0).to(tl.float32)
    x = _streams_tile(streams, own, in_bounds, d, dim, N)
    for k in tl.static_range(N):
        at = comb + (own[:, None] * N + n) * N + k
        weight = tl.load(at, mask=in_bounds[:, None], other=0.0)
        post_weight = tl.load(post + own * N + k, mask=in_bounds, other=0.0)
        mixed = tl.sum(weight[:, :, None] * x, 1) + post_weight[:, None] * y_tile
        at = out + (own * N + k)[:, None] * dim + d[None, :]
        tl.store(at, mixed.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _write_backward(
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
    in_bounds = token < tokens
    own = token.to(tl.int64)
    n = tl.arange(0, N)
    at_post = own[:, None] * N + n[None, :]
    post_weight = tl.load(post + at_post, mask=in_bounds[:, None], other=0.0)
    sum_post = tl.zeros((BLOCK_T, N), tl.float32)
    sum_comb = tl.zeros((BLOCK_T, N, N), tl.float32)
    for start in tl.range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = in_bounds[:, None] & (d < dim)[None, :]
        at = own[:, None] * dim + d[None, :]
        y_tile = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        grad = _streams_tile(grad_out, own, in_bounds, d, dim, N)
        grad_y_tile = tl.sum(post_weight[:, :, None] * grad, 1)
        tl.store(grad_y + at, grad_y_tile.to(grad_y.dtype.element_ty), mask=mask)
        sum_post += tl.sum(grad * y_tile[:, None, :], 2)
        for j in tl.static_range(N):
            wide = (own * N + j)[:, None] * dim + d[None, :]
            x = tl.load(streams + wide, mask=mask, other=0.0).to(tl.float32)
            at_row = comb + (own * N + j)[:, None] * N + n[None, :]
            weight = tl.load(at_row, mask=in_bounds[:, None], other=0.0)
            grad_x = tl.sum(weight[:, :, None] * grad, 1)
            tl.store(grad_streams + wide, grad_x.to(grad_streams.dtype.element_ty), mask=mask)
            dots = tl.sum(grad * x[:, None, :], 2)
            sum_comb += tl.where((n == j)[None, :, None], dots[:, None, :], 0.0)
    tl.store(grad_post + at_post, sum_post, mask=in_bounds[:, None])
    at_comb = (own[:, None, None] * N + n[None, :, None]) * N + n[None, None, :]
    tl.store(grad_comb + at_comb, sum_comb, mask=in_bounds[:, None, None])


@triton.jit(do_not_specialize=["tokens"])
def _mix_backward(
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
    in_bounds = token < tokens
    own = token.to(tl.int64)
    acc = tl.zeros((BLOCK_T, N), tl.float32)
    for start in tl.range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = in_bounds[:, None] & (d < dim)[None, :]
        grad = tl.load(grad_read + own[:, None] * dim + d[None, :], mask=mask, other=0.0)
        x = _streams_tile(streams, own, in_bounds, d, dim, N)
        acc += tl.sum(x * grad.to(tl.float32)[:, None, :], 2)
    at = own[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(grad_pre + at, acc, mask=in_bounds[:, None])


def mix(streams: Tensor, pre: Tensor) -> Tensor:
    """Computes Σ_j pre_j X_j, [T, D] in the streams' dtype."""
    tokens, count, dim = streams.shape
    read = streams.new_empty(tokens, dim)
    if tokens:
        _mix[_grid(tokens, dim)](streams, pre, read, tokens, dim, **_sizes(count))
    return read


def mix_backward(streams: Tensor, grad_read: Tensor) -> Tensor:
    """Returns the gradient of pre, fp32 [T, N]; that of X is computed by `project_backward`."""
    tokens, count, dim = streams.shape
    grad_pre = torch.empty((tokens, count), dtype=torch.float32, device=streams.device)
    if tokens:
        _mix_backward[(triton.cdiv(tokens, _BLOCK_T),)](
            streams, grad_read, grad_pre, tokens, dim, **_sizes(count)
        )
    return grad_pre


def write(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Computes post_k y + Σ_j comb_jk X_j, [T, N, D] in the streams' dtype."""
    tokens, count, dim = streams.shape
    out = torch.empty_like(streams)
    if tokens:
        _write[_grid(tokens, dim)](streams, y, post, comb, out, tokens, dim, **_sizes(count))
    return out


def write_backward(
    streams: Tensor, y: Tensor, post: Tensor, comb: Tensor, grad_out: Tensor
) -> tuple[Tensor, ...]:
    """Returns the gradients of X, y, post and comb."""
    tokens, count, dim = streams.shape
    grads = tuple(torch.empty_like(x) for x in (streams, y, post, comb))
    if tokens:
        _write_backward[(triton.cdiv(tokens, _BLOCK_T),)](
            streams, y, post, comb, grad_out, *grads, tokens, dim, **_sizes(count)
        )
    return grads


def _grid(tokens: int, dim: int) -> tuple[int, int]:
    return triton.cdiv(tokens, _BLOCK_T), triton.cdiv(dim, _BLOCK_D)


def _sizes(streams: int) -> dict[str, int]:
    return {"N": streams, "BLOCK_T": _BLOCK_T, "BLOCK_D": _BLOCK_D, "num_warps": 4}
