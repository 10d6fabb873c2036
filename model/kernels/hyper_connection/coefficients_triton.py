"""Coefficients of hyper-connections in Triton: pre, post and comb from the projections; backward.

``streams_triton.py`` has the plan. A token's numbers stay in registers through all of
Sinkhorn's steps. Backward recomputes the steps and keeps the divisors, N numbers per step, in L2;
each step's input is its output times the divisor.

T tokens; N streams; D their width; M = (2+N)·N coefficients, or N of them in the head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.hyper_connection.project_triton import block_of

_TOKENS = 64
"""Tokens per program."""


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softmax(comb):
    comb = tl.exp(comb - tl.max(comb, 2)[:, :, None])
    return comb / tl.sum(comb, 2)[:, :, None]


@triton.jit
def _normalise(x, at, in_bounds, eps, AXIS: tl.constexpr, KEEP: tl.constexpr):
    """Divides x [T, N, N] by its sums along AXIS, which are stored at ``at`` [T, N]."""
    divisor = tl.sum(x, AXIS) + eps
    if KEEP:
        tl.store(at, divisor, mask=in_bounds[:, None])
    return x / tl.expand_dims(divisor, AXIS)


@triton.jit
def _normalise_backward(grad, y, at, in_bounds, AXIS: tl.constexpr):
    """Backward of `_normalise`: returns the gradient of x, and x recomputed from y.

    y = x / d with d = Σx + eps, so dx = (dy - Σ dy·y) / d, and x = y · d.
    """
    divisor = tl.expand_dims(tl.load(at, mask=in_bounds[:, None], other=1.0), AXIS)
    return (grad - tl.expand_dims(tl.sum(grad * y, AXIS), AXIS)) / divisor, y * divisor


@triton.jit
def _sinkhorn(
    soft,
    divisors,
    token,
    in_bounds,
    tokens,
    eps,
    N: tl.constexpr,
    STEPS: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Normalises columns, then ``STEPS`` times rows and columns.

    With KEEP it stores the divisors in ``divisors`` [2·STEPS+1, T, N].
    """
    at = divisors + token.to(tl.int64)[:, None] * N + tl.arange(0, N)[None, :]
    x = _normalise(soft + eps, at, in_bounds, eps, 1, KEEP)
    for _ in tl.range(0, STEPS):
        at += tokens * N
        x = _normalise(x, at, in_bounds, eps, 2, KEEP)
        at += tokens * N
        x = _normalise(x, at, in_bounds, eps, 1, KEEP)
    return x


@triton.jit
def _scaled(w, base, token, in_bounds, scale, first, N: tl.constexpr, OUT: tl.constexpr):
    """Returns w and scale · w + base for the N coefficients from ``first``, [T, N]."""
    n = first + tl.arange(0, N)
    value = tl.load(
        w + token.to(tl.int64)[:, None] * OUT + n[None, :], mask=in_bounds[:, None], other=0
    )
    return value, value * scale + tl.load(base + n)[None, :]


@triton.jit
def _scaled_comb(w, base, token, in_bounds, scale, N: tl.constexpr, OUT: tl.constexpr):
    """Returns offsets, w and scale · w + base for comb, [T, N, N]."""
    n = 2 * N + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    at = token.to(tl.int64)[:, None, None] * OUT + n[None, :, :]
    value = tl.load(w + at, mask=in_bounds[:, None, None], other=0.0)
    return at, value, value * scale + tl.load(base + n)[None, :, :]


@triton.jit(do_not_specialize=["tokens"])
def _coefficients(
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
    in_bounds = token < tokens
    out = tl.arange(0, BLOCK_W)
    mask = in_bounds[:, None] & (out < OUT)[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_W), tl.float32)
    square = tl.zeros((BLOCK_T,), tl.float32)
    row = token.to(tl.int64)
    for _ in tl.range(0, parts):
        acc += tl.load(part_w + row[:, None] * OUT + out[None, :], mask=mask, other=0.0)
        square += tl.load(part_square + row, mask=in_bounds, other=0.0)
        row += tokens
    r = tl.rsqrt(square / width + norm_eps)
    tl.store(rstd + token, r, mask=in_bounds)
    own = token.to(tl.int64)[:, None]
    tl.store(w + own * OUT + out[None, :], acc * r[:, None], mask=mask)
    tl.debug_barrier()  # what follows reads w in other shapes
    n = tl.arange(0, N)[None, :]
    _, x = _scaled(w, base, token, in_bounds, tl.load(scale), 0, N, OUT)
    tl.store(pre + own * N + n, _sigmoid(x) + hc_eps, mask=in_bounds[:, None])
    if not HEAD:
        _, x = _scaled(w, base, token, in_bounds, tl.load(scale + 1), N, N, OUT)
        tl.store(post + own * N + n, 2.0 * _sigmoid(x), mask=in_bounds[:, None])
        _, _, x = _scaled_comb(w, base, token, in_bounds, tl.load(scale + 2), N, OUT)
        x = _sinkhorn(_softmax(x), comb, token, in_bounds, tokens, hc_eps, N, STEPS, False)
        at = own[:, :, None] * (N * N) + tl.arange(0, N)[None, :, None] * N + n[:, None, :]
        tl.store(comb + at, x, mask=in_bounds[:, None, None])


@triton.jit
def _gate_backward(
    grad,
    value,
    factor,
    r,
    token,
    in_bounds,
    grad_w,
    own_sums,
    NUMBER: tl.constexpr,
    N: tl.constexpr,
    OUT: tl.constexpr,
):
    """Backward of the scaling of pre (NUMBER 0) or post (1).

    Given the gradient [T, N] at the sigmoid's input, stores that of w, and those of base and scale
    among the program's ``own_sums``. Returns its part of ``norm_term`` [T].
    """
    n = NUMBER * N + tl.arange(0, N)
    at = grad_w + token.to(tl.int64)[:, None] * OUT + n[None, :]
    tl.store(at, grad * factor * r[:, None], mask=in_bounds[:, None])
    tl.store(own_sums + n, tl.sum(grad, 0))
    tl.store(own_sums + OUT + NUMBER, tl.sum(tl.sum(grad * value, 1), 0))
    return tl.sum(grad * factor * value, 1)


@triton.jit(do_not_specialize=["tokens"])
def _coefficients_backward(
    w,
    base,
    scale,
    rstd,
    grad_pre,
    grad_post,
    grad_comb,
    divisors,
    grad_w,
    norm_term,
    sums,
    tokens,
    width,
    hc_eps,
    N: tl.constexpr,
    OUT: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HEAD: tl.constexpr,
):
    """Computes the gradients of the projections (times rstd) and of base and scale.

    Those of base [OUT] and scale, in this order, are partial ``sums`` of each program, [parts,
    OUT + 3]. X's gradient gets -``norm_term`` · X from the norm.
    """
    program = tl.program_id(0)
    own_sums = sums + program * (OUT + 3)
    token = program * BLOCK_T + tl.arange(0, BLOCK_T)
    in_bounds = token < tokens
    own = token.to(tl.int64)[:, None]
    n = tl.arange(0, N)
    r = tl.load(rstd + token, mask=in_bounds, other=0.0)
    factor = tl.load(scale)
    value, x = _scaled(w, base, token, in_bounds, factor, 0, N, OUT)
    s = _sigmoid(x)
    grad = (
        tl.load(grad_pre + own * N + n[None, :], mask=in_bounds[:, None], other=0.0) * s * (1.0 - s)
    )
    sum_norm_term = _gate_backward(
        grad, value, factor, r, token, in_bounds, grad_w, own_sums, 0, N, OUT
    )
    if not HEAD:
        factor = tl.load(scale + 1)
        value, x = _scaled(w, base, token, in_bounds, factor, N, N, OUT)
        s = _sigmoid(x)
        grad = tl.load(grad_post + own * N + n[None, :], mask=in_bounds[:, None], other=0.0)
        grad *= 2.0 * s * (1.0 - s)
        sum_norm_term += _gate_backward(
            grad, value, factor, r, token, in_bounds, grad_w, own_sums, 1, N, OUT
        )
        factor = tl.load(scale + 2)
        offsets, value, x = _scaled_comb(w, base, token, in_bounds, factor, N, OUT)
        soft = _softmax(x)
        y = _sinkhorn(soft, divisors, token, in_bounds, tokens, hc_eps, N, STEPS, True)
        tl.debug_barrier()
        at = own[:, :, None] * (N * N) + n[None, :, None] * N + n[None, None, :]
        grad = tl.load(grad_comb + at, mask=in_bounds[:, None, None], other=0.0)
        at = divisors + own * N + n[None, :] + 2 * STEPS * tokens * N
        for _ in tl.range(0, STEPS):
            grad, y = _normalise_backward(grad, y, at, in_bounds, 1)
            grad, y = _normalise_backward(grad, y, at - tokens * N, in_bounds, 2)
            at -= 2 * tokens * N
        grad, _ = _normalise_backward(grad, y, at, in_bounds, 1)
        grad = (grad - tl.sum(grad * soft, 2)[:, :, None]) * soft
        sum_norm_term += tl.sum(tl.sum(grad * factor * value, 2), 1)
        tl.store(grad_w + offsets, grad * factor * r[:, None, None], mask=in_bounds[:, None, None])
        tl.store(own_sums + 2 * N + n[:, None] * N + n[None, :], tl.sum(grad, 0))
        total = tl.sum(tl.sum(tl.sum(grad * value, 2), 1), 0)
        tl.store(own_sums + OUT + 2, total)
    tl.store(norm_term + token, sum_norm_term * r * r / width, mask=in_bounds)


def coefficients(
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
    """Returns w [T, M], 1 / rms [T], pre [T, N], post [T, N] and comb [T, N, N], all fp32.

    Args:
        part_w, part_square: as `project` returns them.
        width: N·D, the number of elements in the norm's mean.
        streams: N.
        steps: number of (row, column) normalisations after the first column one; None for the
            head, which has only pre.
    """
    parts, tokens, out = part_w.shape
    w, rstd = part_w.new_empty(tokens, out), part_w.new_empty(tokens)
    pre, post = (part_w.new_empty(tokens, streams) for _ in range(2))
    comb = part_w.new_empty(tokens, streams, streams)
    if tokens:
        _coefficients[(triton.cdiv(tokens, _TOKENS),)](
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


def coefficients_backward(
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
    """Returns grad_w · rstd [T, M], ``norm_term`` [T], and the gradients of base and scale.

    X's gradient gets -``norm_term`` · X from the norm.
    """
    tokens, streams = grad_pre.shape
    out, programs = w.shape[1], triton.cdiv(tokens, _TOKENS)
    grad_w, norm_term = torch.empty_like(w), torch.empty_like(rstd)
    sums = w.new_empty(programs, out + 3)
    divisors = w.new_empty(2 * (steps or 0) + 1, tokens, streams)
    if tokens:
        _coefficients_backward[(programs,)](
            w,
            base,
            scale,
            rstd,
            grad_pre,
            grad_post,
            grad_comb,
            divisors,
            grad_w,
            norm_term,
            sums,
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
    total = sums.sum(0)
    return grad_w, norm_term, total[:out], total[out : out + len(scale)]
