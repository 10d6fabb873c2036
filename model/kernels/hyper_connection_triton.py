"""Hyper-connections in Triton, forward and backward; the reference is ``hyper_connection.py``.

Everything inside is fp32. The kernels, in the order of a sub-layer:

    _project    X [T, N·D] times fnᵀ [N·D, w] and Σ X², w = N(N+2) <= 24; the columns are divided
                over programs, whose parts are added in a fixed order by the next kernel
    _weigh      pre, post, comb of every token from these; Sinkhorn's steps in registers
    _mix        x = Σ pre_j X_j
    _write      X'_k = post_k y + Σ comb_jk X_j

and backward:

    _write_back     gradients of X, y, post, comb: each token's sums over D stay in one program
    _read_back      that of pre, Σ X_j · grad_x
    _weigh_back     through Sinkhorn: the divisors, N numbers a step, are computed again and kept in
                    L2, and each step's matrix is that after it times the divisor
    _project_back   that of X, and fn's in parts that are added in a fixed order

Nothing is added to by two programs, so that two runs agree bit for bit. An fp32 factor of a product
is the sum of two that TF32 holds: 22 bits, against 8 of a bf16 one. Keeping X of a token between
_project and _mix would take 2·N·D bytes of registers, and then fn, 1.5 MB, would be read for every
few tokens: more from L2 than X is from memory. So X is read twice.

Bytes a token in bf16 with N = 4, beside which the products (2·24·N·D operations, two or three times
in TF32) and Sinkhorn's 1,500 operations take less time:

                       fewest                   as written
    read, forward      2·(N + 1)·D              2·(2·N + 1)·D
    write, forward     2·(2·N + 1)·D            the same
    write, backward    2·(3·N + 2)·D            the same
    read, backward     2·(2·N + 1)·D            2·(3·N + 2)·D

    floor per token at 3.35 TB/s, ns     fewest, Flash / Pro    as written    measured
    read, forward                            12 /  21             22 /  39    not yet timed
    write, forward                           22 /  39             22 /  39    not yet timed
    write, backward                          34 /  60             34 /  60    not yet timed
    read, backward                           22 /  39             34 /  60    not yet timed
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels import backend

_TOKENS, _BACK_TOKENS, _COLUMNS = 64, 32, 64
"""Tokens and columns of a tile of products, as large as fits into registers."""
_FEW = 4
"""Tokens of a program whose sums run over all of D."""
_MIXED = 512
"""Columns of D that are mixed at once."""
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
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softmax(comb):
    comb = tl.exp(comb - tl.max(comb, 2)[:, :, None])
    return comb / tl.sum(comb, 2)[:, :, None]


@triton.jit
def _sinkhorn(
    soft,
    divisors,
    token,
    live,
    tokens,
    eps,
    N: tl.constexpr,
    STEPS: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Columns, then ``STEPS`` times rows and columns; the divisors into [2·STEPS+1, T, N]."""
    n = tl.arange(0, N)[None, :]
    at = token.to(tl.int64)[:, None] * N + n
    x = soft + eps
    divisor = tl.sum(x, 1) + eps
    x = x / divisor[:, None, :]
    if KEEP:
        tl.store(divisors + at, divisor, mask=live[:, None])
    for _ in tl.range(0, STEPS):
        divisor = tl.sum(x, 2) + eps
        x = x / divisor[:, :, None]
        if KEEP:
            at += tokens * N
            tl.store(divisors + at, divisor, mask=live[:, None])
        divisor = tl.sum(x, 1) + eps
        x = x / divisor[:, None, :]
        if KEEP:
            at += tokens * N
            tl.store(divisors + at, divisor, mask=live[:, None])
    return x


@triton.jit
def _scaled(w, base, token, live, scale, first, N: tl.constexpr, OUT: tl.constexpr):
    """Projections of the N rows from ``first`` on, [T, N], times the factor plus the biases."""
    n = first + tl.arange(0, N)
    value = tl.load(w + token.to(tl.int64)[:, None] * OUT + n[None, :], mask=live[:, None], other=0)
    return value, value * scale + tl.load(base + n)[None, :]


@triton.jit
def _scaled_comb(w, base, token, live, scale, N: tl.constexpr, OUT: tl.constexpr):
    """The same of comb, [T, N, N]."""
    n = 2 * N + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    at = token.to(tl.int64)[:, None, None] * OUT + n[None, :, :]
    value = tl.load(w + at, mask=live[:, None, None], other=0.0)
    return at, value, value * scale + tl.load(base + n)[None, :, :]


@triton.jit
def _weigh(
    part_w,
    part_square,
    base,
    scale,
    w,
    rstd,
    pre,
    post,
    comb,
    tokens,
    parts,
    width,
    norm_eps,
    hc_eps,
    N: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HEAD: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = token < tokens
    out = tl.arange(0, BLOCK_W)
    mask = live[:, None] & (out < OUT)[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_W), tl.float32)
    square = tl.zeros((BLOCK_T,), tl.float32)
    row = token.to(tl.int64)
    for _ in tl.range(0, parts):
        acc += tl.load(part_w + row[:, None] * OUT + out[None, :], mask=mask, other=0.0)
        square += tl.load(part_square + row, mask=live, other=0.0)
        row += tokens
    r = tl.rsqrt(square / width + norm_eps)
    tl.store(rstd + token, r, mask=live)
    own = token.to(tl.int64)[:, None]
    tl.store(w + own * OUT + out[None, :], acc * r[:, None], mask=mask)
    tl.debug_barrier()  # what follows reads w in other shapes
    n = tl.arange(0, N)[None, :]
    _, x = _scaled(w, base, token, live, tl.load(scale), 0, N, OUT)
    tl.store(pre + own * N + n, _sigmoid(x) + hc_eps, mask=live[:, None])
    if not HEAD:
        _, x = _scaled(w, base, token, live, tl.load(scale + 1), N, N, OUT)
        tl.store(post + own * N + n, 2.0 * _sigmoid(x), mask=live[:, None])
        _, _, x = _scaled_comb(w, base, token, live, tl.load(scale + 2), N, OUT)
        x = _sinkhorn(_softmax(x), comb, token, live, tokens, hc_eps, N, STEPS, False)
        at = own[:, :, None] * (N * N) + tl.arange(0, N)[None, :, None] * N + n[:, None, :]
        tl.store(comb + at, x, mask=live[:, None, None])


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
def _read_back(
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


@triton.jit
def _weigh_back(
    w,
    base,
    scale,
    rstd,
    grad_pre,
    grad_post,
    grad_comb,
    divisors,
    grad_w,
    along,
    grad_base,
    grad_scale,
    tokens,
    width,
    hc_eps,
    N: tl.constexpr,
    OUT: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HEAD: tl.constexpr,
):
    """Of the projections, times rstd; of base [parts, OUT] and scale [parts, 4] by programs.

    ``along`` is what the norm of X takes off its gradient for each X.
    """
    program = tl.program_id(0)
    token = program * BLOCK_T + tl.arange(0, BLOCK_T)
    live = token < tokens
    own = token.to(tl.int64)[:, None]
    n = tl.arange(0, N)
    r = tl.load(rstd + token, mask=live, other=0.0)
    factor = tl.load(scale)
    value, x = _scaled(w, base, token, live, factor, 0, N, OUT)
    s = _sigmoid(x)
    grad = tl.load(grad_pre + own * N + n[None, :], mask=live[:, None], other=0.0) * s * (1.0 - s)
    sum_along = tl.sum(grad * factor * value, 1)
    tl.store(grad_w + own * OUT + n[None, :], grad * factor * r[:, None], mask=live[:, None])
    tl.store(grad_base + program * OUT + n, tl.sum(grad, 0))
    tl.store(grad_scale + program * 4, tl.sum(tl.sum(grad * value, 1), 0))
    if not HEAD:
        factor = tl.load(scale + 1)
        value, x = _scaled(w, base, token, live, factor, N, N, OUT)
        s = _sigmoid(x)
        grad = tl.load(grad_post + own * N + n[None, :], mask=live[:, None], other=0.0)
        grad *= 2.0 * s * (1.0 - s)
        sum_along += tl.sum(grad * factor * value, 1)
        at = grad_w + own * OUT + N + n[None, :]
        tl.store(at, grad * factor * r[:, None], mask=live[:, None])
        tl.store(grad_base + program * OUT + N + n, tl.sum(grad, 0))
        tl.store(grad_scale + program * 4 + 1, tl.sum(tl.sum(grad * value, 1), 0))
        factor = tl.load(scale + 2)
        place, value, x = _scaled_comb(w, base, token, live, factor, N, OUT)
        soft = _softmax(x)
        y = _sinkhorn(soft, divisors, token, live, tokens, hc_eps, N, STEPS, True)
        tl.debug_barrier()
        at = own[:, :, None] * (N * N) + n[None, :, None] * N + n[None, None, :]
        grad = tl.load(grad_comb + at, mask=live[:, None, None], other=0.0)
        at = divisors + own * N + n[None, :] + 2 * STEPS * tokens * N
        # y = x / d with d = Σx + eps, so dx = (dy - Σ dy·y) / d, and x = y · d.
        for _ in tl.range(0, STEPS):
            d = tl.load(at, mask=live[:, None], other=1.0)
            grad = (grad - tl.sum(grad * y, 1)[:, None, :]) / d[:, None, :]
            y = y * d[:, None, :]
            d = tl.load(at - tokens * N, mask=live[:, None], other=1.0)
            grad = (grad - tl.sum(grad * y, 2)[:, :, None]) / d[:, :, None]
            y = y * d[:, :, None]
            at -= 2 * tokens * N
        d = tl.load(at, mask=live[:, None], other=1.0)
        grad = (grad - tl.sum(grad * y, 1)[:, None, :]) / d[:, None, :]
        grad = (grad - tl.sum(grad * soft, 2)[:, :, None]) * soft
        sum_along += tl.sum(tl.sum(grad * factor * value, 2), 1)
        tl.store(grad_w + place, grad * factor * r[:, None, None], mask=live[:, None, None])
        at = program * OUT + 2 * N + n[:, None] * N + n[None, :]
        tl.store(grad_base + at, tl.sum(grad, 0))
        total = tl.sum(tl.sum(tl.sum(grad * value, 2), 1), 0)
        tl.store(grad_scale + program * 4 + 2, total)
    tl.store(along + token, sum_along * r * r / width, mask=live)


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


def read_streams(
    streams_TND: Tensor,
    fn_wX: Tensor,
    base_w: Tensor,
    scale_3: Tensor,
    *,
    norm_eps: float,
    hc_eps: float,
    iterations: int | None,
) -> Any:
    """``read_streams`` of hyper_connection.py in Triton; with ``iterations`` None its
    ``collapse_streams``.

    Raises:
        UnsupportedError: a GPU cannot run this device, dtype or number of streams.
        ValueError: the number of streams is not a power of two.
    """
    _check(streams_TND)
    return _Read.apply(
        streams_TND.contiguous(), fn_wX, base_w, scale_3, norm_eps, hc_eps, iterations
    )


def write_streams(streams_TND: Tensor, y_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
    """``write_streams`` of hyper_connection.py in Triton; raises as `read_streams` does."""
    _check(streams_TND)
    return _Write.apply(
        streams_TND.contiguous(), y_TD.contiguous(), post_TN.contiguous(), comb_TNN.contiguous()
    )


def _check(streams_TND: Tensor) -> None:
    count = streams_TND.shape[1]
    backend.hyper_connection(streams_TND.device, streams_TND.dtype, count, asked=True)
    if count & (count - 1):
        raise ValueError(f"{count} residual streams; Triton mixes powers of two")


def _mixing_grid(tokens: int, dim: int) -> tuple[int, int]:
    return triton.cdiv(tokens, _FEW), triton.cdiv(dim, _MIXED)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        norm_eps: float,
        hc_eps: float,
        iterations: int | None,
    ) -> Any:
        tokens, count, dim = streams.shape
        out, width, head = len(fn), count * dim, iterations is None
        fn, base, scale = (x.float().contiguous() for x in (fn, base, scale))
        rows = triton.cdiv(tokens, _TOKENS)
        parts = min(max(_PROGRAMS // max(rows, 1), 1), triton.cdiv(width, _COLUMNS))
        span = triton.cdiv(triton.cdiv(width, parts), _COLUMNS) * _COLUMNS
        parts = triton.cdiv(width, span)

        def fp32(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=streams.device)

        part_w, part_square = fp32(parts, tokens, out), fp32(parts, tokens)
        w, rstd, pre = fp32(tokens, out), fp32(tokens), fp32(tokens, count)
        post, comb = fp32(tokens, count), fp32(tokens, count, count)
        read = streams.new_empty(tokens, dim)
        block_w = max(triton.next_power_of_2(out), 16)
        ctx.sizes = {"N": count, "OUT": out, "STEPS": (iterations or 1) - 1, "HEAD": head}
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
                BLOCK_W=block_w,
                BLOCK_T=_TOKENS,
                BLOCK_X=_COLUMNS,
                num_warps=8,
                num_stages=3,
            )
            _weigh[(triton.cdiv(tokens, _TOKENS),)](
                part_w,
                part_square,
                base,
                scale,
                w,
                rstd,
                pre,
                post,
                comb,
                tokens,
                parts,
                width,
                norm_eps,
                hc_eps,
                BLOCK_W=block_w,
                BLOCK_T=_TOKENS,
                num_warps=2,
                **ctx.sizes,
            )
            _mix[_mixing_grid(tokens, dim)](
                streams, pre, read, tokens, dim, N=count, BLOCK_T=_FEW, BLOCK_D=_MIXED, num_warps=4
            )
        ctx.save_for_backward(streams, fn, base, scale, w, rstd, pre)
        ctx.hc_eps, ctx.block_w = hc_eps, block_w
        return read if head else (read, post, comb)

    @staticmethod
    def backward(ctx: Any, grad_read: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        streams, fn, base, scale, w, rstd, pre = ctx.saved_tensors
        tokens, count, dim = streams.shape
        out, width, steps = ctx.sizes["OUT"], count * dim, ctx.sizes["STEPS"]
        grad_read = grad_read.contiguous()
        others = tuple(x.contiguous() for x in grads)  # none of the head's
        programs = triton.cdiv(tokens, _TOKENS)

        def fp32(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=streams.device)

        grad_pre, grad_w, along = fp32(tokens, count), fp32(tokens, out), fp32(tokens)
        grad_base, grad_scale = fp32(programs, out), fp32(programs, 4)
        divisors = fp32(2 * steps + 1, tokens, count)
        chunks = count * triton.cdiv(dim, _COLUMNS)
        parts = min(max(_PROGRAMS // chunks, 1), max(programs, 1))
        span = max(triton.cdiv(triton.cdiv(tokens, parts), _BACK_TOKENS), 1) * _BACK_TOKENS
        parts = triton.cdiv(tokens, span)
        grad_streams, grad_fn = torch.empty_like(streams), fp32(parts, out, width)
        if tokens:
            _read_back[(triton.cdiv(tokens, _FEW),)](
                streams,
                grad_read,
                grad_pre,
                tokens,
                dim,
                N=count,
                BLOCK_T=_FEW,
                BLOCK_D=_MIXED,
                num_warps=4,
            )
            _weigh_back[(programs,)](
                w,
                base,
                scale,
                rstd,
                grad_pre,
                *(others or (None, None)),
                divisors,
                grad_w,
                along,
                grad_base,
                grad_scale,
                tokens,
                width,
                ctx.hc_eps,
                BLOCK_T=_TOKENS,
                num_warps=2,
                **ctx.sizes,
            )
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
                BLOCK_W=ctx.block_w,
                BLOCK_T=_BACK_TOKENS,
                BLOCK_X=_COLUMNS,
                num_warps=4,
                num_stages=2,
            )
        grad_scale = grad_scale.sum(0)[: len(scale)]
        return grad_streams, grad_fn.sum(0), grad_base.sum(0), grad_scale, None, None, None


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        tokens, count, dim = streams.shape
        out = torch.empty_like(streams)
        if tokens:
            _write[_mixing_grid(tokens, dim)](
                streams,
                y,
                post,
                comb,
                out,
                tokens,
                dim,
                N=count,
                BLOCK_T=_FEW,
                BLOCK_D=_MIXED,
                num_warps=4,
            )
        ctx.save_for_backward(streams, y, post, comb)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
        streams, y, post, comb = ctx.saved_tensors
        tokens, count, dim = streams.shape
        grads = [torch.empty_like(x) for x in (streams, y, post, comb)]
        if tokens:
            _write_back[(triton.cdiv(tokens, _FEW),)](
                streams,
                y,
                post,
                comb,
                grad_out.contiguous(),
                *grads,
                tokens,
                dim,
                N=count,
                BLOCK_T=_FEW,
                BLOCK_D=_MIXED,
                num_warps=4,
            )
        return tuple(grads)
