"""Reading from and writing to the residual streams in Triton, forward and backward.

``streams_triton.py`` has the plan. Forward divides the columns over programs; in backward a program
has all columns of a few tokens, because its sums run over D. Streams are tiles of their own: as a
dimension of a tile, Triton would divide them among warps, and sums pass through shared memory.

T tokens; N streams; D their width; M = (2+N)·N coefficients, or N of them in the head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_T = 4
"""Tokens per program, one a warp: sums over columns stay within it."""
_BLOCK_D = 256
"""Columns of D processed at once."""


@triton.jit
def _tile(x, row, d, dim, in_bounds):
    """Loads columns d of rows of an array [rows, dim] as fp32 [BLOCK_T, BLOCK_D]."""
    mask = in_bounds[:, None] & (d < dim)[None, :]
    return tl.load(x + row[:, None] * dim + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(x, value, row, d, dim, in_bounds):
    """Stores what `_tile` would load."""
    mask = in_bounds[:, None] & (d < dim)[None, :]
    tl.store(x + row[:, None] * dim + d[None, :], value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _stream_tiles(x, own, d, dim, in_bounds, N: tl.constexpr):
    """Loads the N tiles of an array [T, N, dim]: one for each stream, so that sums over streams
    need no exchange between threads.
    """
    tiles = ()
    for j in tl.static_range(N):
        tiles += (_tile(x, own * N + j, d, dim, in_bounds),)  # type: ignore[assignment]
    return tiles


@triton.jit
def _numbers(x, first, in_bounds, COUNT: tl.constexpr):
    """Loads COUNT numbers of each token, from index ``first`` [BLOCK_T], each as [BLOCK_T]."""
    numbers = ()
    for i in tl.static_range(COUNT):
        number = tl.load(x + first + i, mask=in_bounds, other=0.0)
        numbers += (number,)  # type: ignore[assignment]
    return numbers


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
    weights = _numbers(pre, own * N, in_bounds, N)
    x = _stream_tiles(streams, own, d, dim, in_bounds, N)
    mixed = weights[0][:, None] * x[0]
    for j in tl.static_range(1, N):
        mixed += weights[j][:, None] * x[j]
    _store(read, mixed, own, d, dim, in_bounds)


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
    own = token.to(tl.int64)
    post_N = _numbers(post, own * N, in_bounds, N)
    comb_NN = _numbers(comb, own * N * N, in_bounds, N * N)
    y_tile = _tile(y, own, d, dim, in_bounds)
    x = _stream_tiles(streams, own, d, dim, in_bounds, N)
    for k in tl.static_range(N):
        mixed = post_N[k][:, None] * y_tile
        for j in tl.static_range(N):
            mixed += comb_NN[j * N + k][:, None] * x[j]
        _store(out, mixed, own * N + k, d, dim, in_bounds)


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
    post_N = _numbers(post, own * N, in_bounds, N)
    comb_NN = _numbers(comb, own * N * N, in_bounds, N * N)
    n = tl.arange(0, N)[None, :]
    nn = tl.arange(0, N * N)[None, :]
    sum_post = tl.zeros((BLOCK_T, N), tl.float32)
    sum_comb = tl.zeros((BLOCK_T, N * N), tl.float32)
    for start in tl.range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        y_tile = _tile(y, own, d, dim, in_bounds)
        grad = _stream_tiles(grad_out, own, d, dim, in_bounds, N)
        grad_y_tile = post_N[0][:, None] * grad[0]
        for k in tl.static_range(N):
            if k > 0:
                grad_y_tile += post_N[k][:, None] * grad[k]
            sum_post += tl.where(n == k, tl.sum(grad[k] * y_tile, 1)[:, None], 0.0)
        _store(grad_y, grad_y_tile, own, d, dim, in_bounds)
        for j in tl.static_range(N):
            x = _tile(streams, own * N + j, d, dim, in_bounds)
            grad_x = comb_NN[j * N][:, None] * grad[0]
            for k in tl.static_range(N):
                if k > 0:
                    grad_x += comb_NN[j * N + k][:, None] * grad[k]
                dots = tl.sum(grad[k] * x, 1)
                sum_comb += tl.where(nn == j * N + k, dots[:, None], 0.0)
            _store(grad_streams, grad_x, own * N + j, d, dim, in_bounds)
    tl.store(grad_post + own[:, None] * N + n, sum_post, mask=in_bounds[:, None])
    tl.store(grad_comb + own[:, None] * (N * N) + nn, sum_comb, mask=in_bounds[:, None])


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
    n = tl.arange(0, N)[None, :]
    acc = tl.zeros((BLOCK_T, N), tl.float32)
    for start in tl.range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        grad = _tile(grad_read, own, d, dim, in_bounds)
        x = _stream_tiles(streams, own, d, dim, in_bounds, N)
        for j in tl.static_range(N):
            acc += tl.where(n == j, tl.sum(x[j] * grad, 1)[:, None], 0.0)
    tl.store(grad_pre + own[:, None] * N + n, acc, mask=in_bounds[:, None])


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
