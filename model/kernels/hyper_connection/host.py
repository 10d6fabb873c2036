"""Hyper-connections as fused loops for a CPU, in fp32.

Coefficients are computed for 64 tokens at once, in arrays whose last dim is the token: every step
of Sinkhorn's normalisation is then a few dozen vector instructions, which outweigh their set-up.

T tokens; N streams; D their width; M = (2+N)·N coefficients, or N of them in the head.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.kernels import host
from model.kernels.host import Array, fused_loop

_LANES = 64
_F32 = np.float32


def read_forward(
    streams_TND: Tensor,
    w_TM: Tensor,
    base_M: Tensor,
    scale: Tensor,
    norm_eps: float,
    hc_eps: float,
    iterations: int | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Computes what a sub-layer reads, and the coefficients.

    Args:
        w_TM: the streams times fnᵀ; multiplied here by the norm's 1/rms.

    Returns:
        the norm's 1/rms [T, 1]; Σ_j pre_j X_j [T, D]; and post and comb (none in the head).
    """
    tokens, n, dim = streams_TND.shape
    rstd, read = w_TM.new_empty(tokens, 1), w_TM.new_empty(tokens, dim)
    post = w_TM.new_empty(tokens, n) if iterations else w_TM.new_empty(0, n)
    comb = w_TM.new_empty(len(post), n, n)
    host.over_rows(
        _read_rows,
        streams_TND,
        *(w_TM, base_M, scale, norm_eps, hc_eps, _steps(iterations), rstd, read, post, comb),
    )
    return rstd, read, (post, comb) if iterations else ()


def read_gradients(
    streams_TND: Tensor,
    w_TM: Tensor,
    rstd_T1: Tensor,
    fn: Tensor,
    base_M: Tensor,
    scale: Tensor,
    hc_eps: float,
    iterations: int | None,
    grads: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of streams, fn, base and scale from those of read, post and comb."""
    tokens, n, dim = streams_TND.shape
    grad_read = grads[0]
    grad_post, grad_comb = grads[1:] or (w_TM.new_empty(0, n), w_TM.new_empty(0, n, n))
    projected_TM, pre_and_norm = w_TM.new_empty(w_TM.shape), w_TM.new_empty(tokens, n + 1)
    grad_base, grad_scale = base_M.new_empty(base_M.shape), scale.new_empty(scale.shape)
    host.over_rows(
        _coefficient_gradient_rows,
        streams_TND,
        *(w_TM, base_M, scale, hc_eps, _steps(iterations)),
        *(grad_read, grad_post, grad_comb, projected_TM, pre_and_norm),
    )
    coefficients = (w_TM, rstd_T1, scale, projected_TM, pre_and_norm, grad_base, grad_scale)
    _finish_coefficient_gradients(n * dim, *map(host.array, coefficients))
    grad_streams = torch.mm(projected_TM, fn)
    grad_fn = torch.mm(projected_TM.t(), streams_TND.flatten(1))
    grad_streams = grad_streams.view_as(streams_TND)
    host.over_rows(_stream_gradient_rows, streams_TND, grad_read, pre_and_norm, grad_streams)
    return grad_streams, grad_fn, grad_base, grad_scale


def write_forward(streams_TND: Tensor, y_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
    """Computes X'_k = post_k · y + Σ_j comb[j, k] · X_j."""
    out = streams_TND.new_empty(streams_TND.shape)
    host.over_rows(_write_rows, streams_TND, y_TD, post_TN, comb_TNN, out)
    return out


def write_gradients(
    streams_TND: Tensor, y_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor, grad_TND: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of streams, y, post and comb."""
    grad_streams, grad_y = streams_TND.new_empty(streams_TND.shape), y_TD.new_empty(y_TD.shape)
    grad_post, grad_comb = post_TN.new_empty(post_TN.shape), comb_TNN.new_empty(comb_TNN.shape)
    host.over_rows(
        _write_gradient_rows,
        *(streams_TND, y_TD, post_TN, comb_TNN, grad_TND),
        *(grad_streams, grad_y, grad_post, grad_comb),
    )
    return grad_streams, grad_y, grad_post, grad_comb


def _steps(iterations: int | None) -> int:
    return 2 * iterations - 1 if iterations else 0


@fused_loop
def _logits(first: int, last: int, w: Array, base: Array, scale: Array, n: int, out: Array) -> None:
    for m in range(w.shape[1]):
        factor = scale[min(m // n, 2)]
        for t in range(first, last):
            out[m, t - first] = w[t, m] * factor + base[m]


@fused_loop
def _sigmoid(x: Array) -> None:
    for m in range(x.shape[0]):
        for b in range(_LANES):
            x[m, b] = _F32(1) / (_F32(1) + math.exp(-x[m, b]))


@fused_loop
def _softmax(x: Array, n: int) -> None:
    # x[i·n + j] is entry (i, j) of the matrices of 64 tokens; over j
    for i in range(n):
        for b in range(_LANES):
            top = x[i * n, b]
            for j in range(1, n):
                top = max(top, x[i * n + j, b])
            total = _F32(0)
            for j in range(n):
                x[i * n + j, b] = math.exp(x[i * n + j, b] - top)
                total += x[i * n + j, b]
            for j in range(n):
                x[i * n + j, b] /= total


@fused_loop
def _normalise(x: Array, n: int, step: int, eps: Any, out: Array, divisor: Array) -> None:
    # Even steps sum over i, odd ones over j.
    along, across = (n, 1) if step % 2 == 0 else (1, n)
    for a in range(n):
        total = divisor[a]
        for b in range(_LANES):
            total[b] = eps
        for k in range(a * across, a * across + n * along, along):
            for b in range(_LANES):
                total[b] += x[k, b]
        for k in range(a * across, a * across + n * along, along):
            for b in range(_LANES):
                out[k, b] = x[k, b] / total[b]


@fused_loop
def _normalise_backward(
    grad: Array, y: Array, n: int, step: int, divisor: Array, total: Array
) -> None:
    # y = x / (Σx + eps), so dx = (dy - Σ dy·y) / (Σx + eps)
    along, across = (n, 1) if step % 2 == 0 else (1, n)
    for a in range(n):
        for b in range(_LANES):
            total[b] = 0
        for k in range(a * across, a * across + n * along, along):
            for b in range(_LANES):
                total[b] += grad[k, b] * y[k, b]
        for k in range(a * across, a * across + n * along, along):
            for b in range(_LANES):
                grad[k, b] = (grad[k, b] - total[b]) / divisor[a, b]


@fused_loop
def _read_rows(
    start: int,
    stop: int,
    streams: Array,
    w: Array,
    base: Array,
    scale: Array,
    norm_epsilon: float,
    hc_epsilon: float,
    steps: int,
    rstd: Array,
    read: Array,
    post: Array,
    comb: Array,
) -> None:
    _, n, dim = streams.shape
    norm_eps, hc_eps = _F32(norm_epsilon), _F32(hc_epsilon)
    logits = np.zeros((w.shape[1], _LANES), _F32)
    divisor = np.empty((n, _LANES), _F32)
    two = np.empty((2, n * n, _LANES), _F32)
    for first in range(start, stop, _LANES):
        last = min(first + _LANES, stop)
        for t in range(first, last):
            total = _F32(0)
            for j in range(n):
                x = streams[t, j]
                for d in range(dim):
                    total += x[d] * x[d]
            rstd[t, 0] = _F32(1) / math.sqrt(total / _F32(n * dim) + norm_eps)
            for m in range(w.shape[1]):
                w[t, m] *= rstd[t, 0]
        _logits(first, last, w, base, scale, n, logits)
        _sigmoid(logits[: 2 * n])
        for t in range(first, last):
            out, x, pre = read[t], streams[t, 0], logits[0, t - first] + hc_eps
            for d in range(dim):
                out[d] = pre * x[d]
            for j in range(1, n):
                x, pre = streams[t, j], logits[j, t - first] + hc_eps
                for d in range(dim):
                    out[d] += pre * x[d]
        if steps == 0:
            continue
        soft, matrix = logits[2 * n :], two[0]
        _softmax(soft, n)
        for k in range(n * n):
            for b in range(_LANES):
                matrix[k, b] = soft[k, b] + hc_eps
        for step in range(steps):
            matrix = two[(step + 1) % 2]  # never in place, which could not be vectorised
            _normalise(two[step % 2], n, step, hc_eps, matrix, divisor)
        for t in range(first, last):
            for i in range(n):
                post[t, i] = _F32(2) * logits[n + i, t - first]
                for j in range(n):
                    comb[t, i, j] = matrix[i * n + j, t - first]


@fused_loop
def _coefficient_gradient_rows(
    start: int,
    stop: int,
    streams: Array,
    w: Array,
    base: Array,
    scale: Array,
    eps: float,
    steps: int,
    grad_read: Array,
    grad_post: Array,
    grad_comb: Array,
    grad_logits: Array,
    pre: Array,
) -> None:
    _, n, dim = streams.shape
    hc_eps = _F32(eps)
    logits = np.zeros((w.shape[1], _LANES), _F32)
    normalised = np.empty((steps + 1, n * n, _LANES), _F32)
    divisors = np.empty((steps, n, _LANES), _F32)
    grad = np.zeros((n * n, _LANES), _F32)
    total_L = np.empty(_LANES, _F32)
    for first in range(start, stop, _LANES):
        last = min(first + _LANES, stop)
        _logits(first, last, w, base, scale, n, logits)
        _sigmoid(logits[: 2 * n])
        for t in range(first, last):
            g = grad_read[t]
            for j in range(n):
                x = streams[t, j]
                total = _F32(0)
                for d in range(dim):
                    total += x[d] * g[d]
                s = logits[j, t - first]
                pre[t, j] = s + hc_eps
                grad_logits[t, j] = total * s * (_F32(1) - s)
        if steps == 0:
            continue
        soft = logits[2 * n :]
        _softmax(soft, n)
        for k in range(n * n):
            for b in range(_LANES):
                normalised[0, k, b] = soft[k, b] + hc_eps
        for step in range(steps):
            _normalise(normalised[step], n, step, hc_eps, normalised[step + 1], divisors[step])
        for t in range(first, last):
            for i in range(n):
                s = logits[n + i, t - first]
                grad_logits[t, n + i] = grad_post[t, i] * _F32(2) * s * (_F32(1) - s)
                for j in range(n):
                    grad[i * n + j, t - first] = grad_comb[t, i, j]
        for step in range(steps - 1, -1, -1):
            _normalise_backward(grad, normalised[step + 1], n, step, divisors[step], total_L)
        for t in range(first, last):
            b = t - first
            for i in range(n):
                total = _F32(0)
                for k in range(i * n, (i + 1) * n):
                    total += grad[k, b] * soft[k, b]
                for k in range(i * n, (i + 1) * n):
                    grad_logits[t, 2 * n + k] = (grad[k, b] - total) * soft[k, b]


@fused_loop
def _finish_coefficient_gradients(
    dims: int,
    w: Array,
    rstd: Array,
    scale: Array,
    grad: Array,
    pre_and_norm: Array,
    grad_base: Array,
    grad_scale: Array,
) -> None:
    """Sums over tokens, and turns the logits' gradient into that of the streams times fnᵀ."""
    # w = (X · fnᵀ) · rstd, and d rstd / dX = -rstd³ · X / (N·D): the norm adds -norm_term · X
    n = pre_and_norm.shape[1] - 1
    base_sum, scale_sum = np.zeros(w.shape[1]), np.zeros(w.shape[1])
    for t in range(len(w)):
        r = rstd[t, 0]
        along_w = _F32(0)
        for m in range(w.shape[1]):
            base_sum[m] += grad[t, m]
            scale_sum[m] += grad[t, m] * w[t, m]
            grad_w = grad[t, m] * scale[min(m // n, 2)]
            along_w += grad_w * w[t, m]
            grad[t, m] = grad_w * r
        pre_and_norm[t, n] = along_w * r * r / _F32(dims)
    totals = np.zeros(len(grad_scale))
    for m in range(w.shape[1]):
        grad_base[m] = base_sum[m]
        totals[min(m // n, 2)] += scale_sum[m]
    for g in range(len(grad_scale)):
        grad_scale[g] = totals[g]


@fused_loop
def _stream_gradient_rows(
    start: int, stop: int, streams: Array, grad_read: Array, pre_and_norm: Array, grad: Array
) -> None:
    _, n, dim = streams.shape
    for t in range(start, stop):
        g, norm_term = grad_read[t], pre_and_norm[t, n]
        for j in range(n):
            x, out, pre = streams[t, j], grad[t, j], pre_and_norm[t, j]
            for d in range(dim):
                out[d] += pre * g[d] - norm_term * x[d]


@fused_loop
def _write_rows(
    start: int, stop: int, streams: Array, y: Array, post: Array, comb: Array, new: Array
) -> None:
    _, n, dim = streams.shape
    for t in range(start, stop):
        for k in range(n):
            out, x, factor = new[t, k], y[t], post[t, k]
            for d in range(dim):
                out[d] = factor * x[d]
            for j in range(n):
                x, factor = streams[t, j], comb[t, j, k]
                for d in range(dim):
                    out[d] += factor * x[d]


@fused_loop
def _write_gradient_rows(
    start: int,
    stop: int,
    streams: Array,
    y: Array,
    post: Array,
    comb: Array,
    grad_new: Array,
    grad_streams: Array,
    grad_y: Array,
    grad_post: Array,
    grad_comb: Array,
) -> None:
    _, n, dim = streams.shape
    for t in range(start, stop):
        for k in range(n):
            g, x, out, factor = grad_new[t, k], y[t], grad_y[t], post[t, k]
            total = _F32(0)
            if k == 0:
                for d in range(dim):
                    out[d] = 0
            for d in range(dim):
                out[d] += factor * g[d]
                total += x[d] * g[d]
            grad_post[t, k] = total
            for j in range(n):
                x, out, factor = streams[t, j], grad_streams[t, j], comb[t, j, k]
                total = _F32(0)
                if k == 0:
                    for d in range(dim):
                        out[d] = 0
                for d in range(dim):
                    out[d] += factor * g[d]
                    total += x[d] * g[d]
                grad_comb[t, j, k] = total
