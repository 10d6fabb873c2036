"""Coefficients of hyper-connections in Triton: pre, post and comb from the projections, and back.

``streams_triton.py`` has the plan. A token's numbers stay in registers through all of
Sinkhorn's steps. Backward computes these again and keeps the divisors, N numbers a step, in L2;
each step's matrix is that after it times the divisor.

T tokens; N streams; D their width; X = N·D; w = N(N+2) coefficients, or N of the head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.hyper_connection.project_triton import block_of

_TOKENS = 64
"""Tokens of a program."""


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softmax(comb):
    comb = tl.exp(comb - tl.max(comb, 2)[:, :, None])
    return comb / tl.sum(comb, 2)[:, :, None]


@triton.jit
def _normalised(x, at, live, eps, AXIS: tl.constexpr, KEEP: tl.constexpr):
    """Divides x [T, N, N] by its sums along AXIS, which are stored at ``at`` [T, N]."""
    divisor = tl.sum(x, AXIS) + eps
    if KEEP:
        tl.store(at, divisor, mask=live[:, None])
    return x / tl.expand_dims(divisor, AXIS)


@triton.jit
def _normalised_back(grad, y, at, live, AXIS: tl.constexpr):
    """The gradient of x from that of `_normalised`'s y, and x.

    y = x / d with d = Σx + eps, so dx = (dy - Σ dy·y) / d, and x = y · d.
    """
    divisor = tl.expand_dims(tl.load(at, mask=live[:, None], other=1.0), AXIS)
    return (grad - tl.expand_dims(tl.sum(grad * y, AXIS), AXIS)) / divisor, y * divisor


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
    at = divisors + token.to(tl.int64)[:, None] * N + tl.arange(0, N)[None, :]
    x = _normalised(soft + eps, at, live, eps, 1, KEEP)
    for _ in tl.range(0, STEPS):
        at += tokens * N
        x = _normalised(x, at, live, eps, 2, KEEP)
        at += tokens * N
        x = _normalised(x, at, live, eps, 1, KEEP)
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
def _gate_back(
    grad,
    value,
    factor,
    r,
    token,
    live,
    grad_w,
    grad_base,
    grad_scale,
    NUMBER: tl.constexpr,
    N: tl.constexpr,
    OUT: tl.constexpr,
):
    """Stores what follows from the gradient [T, N] of pre (NUMBER 0) or post (1) at the sigmoid.

    Returns its part of ``along`` [T].
    """
    n = NUMBER * N + tl.arange(0, N)
    at = grad_w + token.to(tl.int64)[:, None] * OUT + n[None, :]
    tl.store(at, grad * factor * r[:, None], mask=live[:, None])
    program = tl.program_id(0)
    tl.store(grad_base + program * OUT + n, tl.sum(grad, 0))
    tl.store(grad_scale + program * 4 + NUMBER, tl.sum(tl.sum(grad * value, 1), 0))
    return tl.sum(grad * factor * value, 1)


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
    sum_along = _gate_back(
        grad, value, factor, r, token, live, grad_w, grad_base, grad_scale, 0, N, OUT
    )
    if not HEAD:
        factor = tl.load(scale + 1)
        value, x = _scaled(w, base, token, live, factor, N, N, OUT)
        s = _sigmoid(x)
        grad = tl.load(grad_post + own * N + n[None, :], mask=live[:, None], other=0.0)
        grad *= 2.0 * s * (1.0 - s)
        sum_along += _gate_back(
            grad, value, factor, r, token, live, grad_w, grad_base, grad_scale, 1, N, OUT
        )
        factor = tl.load(scale + 2)
        place, value, x = _scaled_comb(w, base, token, live, factor, N, OUT)
        soft = _softmax(x)
        y = _sinkhorn(soft, divisors, token, live, tokens, hc_eps, N, STEPS, True)
        tl.debug_barrier()
        at = own[:, :, None] * (N * N) + n[None, :, None] * N + n[None, None, :]
        grad = tl.load(grad_comb + at, mask=live[:, None, None], other=0.0)
        at = divisors + own * N + n[None, :] + 2 * STEPS * tokens * N
        for _ in tl.range(0, STEPS):
            grad, y = _normalised_back(grad, y, at, live, 1)
            grad, y = _normalised_back(grad, y, at - tokens * N, live, 2)
            at -= 2 * tokens * N
        grad, _ = _normalised_back(grad, y, at, live, 1)
        grad = (grad - tl.sum(grad * soft, 2)[:, :, None]) * soft
        sum_along += tl.sum(tl.sum(grad * factor * value, 2), 1)
        tl.store(grad_w + place, grad * factor * r[:, None, None], mask=live[:, None, None])
        at = program * OUT + 2 * N + n[:, None] * N + n[None, :]
        tl.store(grad_base + at, tl.sum(grad, 0))
        total = tl.sum(tl.sum(tl.sum(grad * value, 2), 1), 0)
        tl.store(grad_scale + program * 4 + 2, total)
    tl.store(along + token, sum_along * r * r / width, mask=live)


def weigh(
    part_w: Tensor,
    part_square: Tensor,
    base: Tensor,
    scale: Tensor,
    width: int,
    *,
    streams: int,
    steps: int | None,
    norm_eps: float,
    hc_eps: float,
) -> tuple[Tensor, ...]:
    """w [T, w], 1 / rms [T], pre [T, N], post [T, N] and comb [T, N, N] of every token, all fp32.

    Args:
        part_w, part_square: as `project` returns them.
        width: N·D, over which the norm's mean goes.
        streams: N.
        steps: rows and columns after the first columns; None where there is pre alone (the head).
    """
    parts, tokens, out = part_w.shape
    w, rstd = part_w.new_empty(tokens, out), part_w.new_empty(tokens)
    pre, post = (part_w.new_empty(tokens, streams) for _ in range(2))
    comb = part_w.new_empty(tokens, streams, streams)
    if tokens:
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
            N=streams,
            OUT=out,
            BLOCK_W=block_of(out),
            STEPS=steps or 0,
            BLOCK_T=_TOKENS,
            HEAD=steps is None,
            num_warps=2,
        )
    return w, rstd, pre, post, comb


def weigh_back(
    w: Tensor,
    base: Tensor,
    scale: Tensor,
    rstd: Tensor,
    grad_pre: Tensor,
    grad_post: Tensor | None,
    grad_comb: Tensor | None,
    width: int,
    *,
    steps: int | None,
    hc_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the projections, times 1 / rms [T, w]; ``along`` [T]; those of base and scale.

    ``along`` is what the norm of X takes off its gradient for each X.
    """
    tokens, streams = grad_pre.shape
    out, programs = w.shape[1], triton.cdiv(tokens, _TOKENS)
    grad_w, along = torch.empty_like(w), torch.empty_like(rstd)
    grad_base, grad_scale = w.new_empty(programs, out), w.new_empty(programs, 4)
    divisors = w.new_empty(2 * (steps or 0) + 1, tokens, streams)
    if tokens:
        _weigh_back[(programs,)](
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
            N=streams,
            OUT=out,
            STEPS=steps or 0,
            BLOCK_T=_TOKENS,
            HEAD=steps is None,
            num_warps=2,
        )
    return grad_w, along, grad_base.sum(0), grad_scale.sum(0)[: len(scale)]
