"""Clamped SwiGLU as fused loops for a CPU, in fp32. n rows; F the inner width.

torch computes the exponentials: its vectorised function returns the same bits in any row.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from model.kernels import host
from model.kernels.host import Array, fused_loop

_F32 = np.float32


def activation(gate_nF: Tensor, up_nF: Tensor, weight_n: Tensor | None, limit: float) -> Tensor:
    """Computes `model.kernels.swiglu.clamped_swiglu` without autograd."""
    out_nF = _exponentials(gate_nF, limit)
    weights = gate_nF.new_empty(0) if weight_n is None else weight_n
    host.over_rows(_activation_rows, gate_nF, up_nF, weights, limit, out_nF)
    return out_nF


def gradients(
    gate_nF: Tensor, up_nF: Tensor, weight_n: Tensor | None, grad_nF: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the gradients of gate, up and weight from the output's."""
    grad_gate_nF, grad_up_nF = _exponentials(gate_nF, limit), up_nF.new_empty(up_nF.shape)
    weights = gate_nF.new_empty(0) if weight_n is None else weight_n
    grad_weight_n = weights.new_empty(weights.shape)
    host.over_rows(
        _gradient_rows,
        *(gate_nF, up_nF, weights, grad_nF, limit, grad_gate_nF, grad_up_nF, grad_weight_n),
    )
    return grad_gate_nF, grad_up_nF, None if weight_n is None else grad_weight_n


def _exponentials(gate_nF: Tensor, limit: float) -> Tensor:
    """Returns exp(-min(gate, limit)), which the kernels then overwrite."""
    return gate_nF.contiguous().clamp(max=limit).neg_().exp_()


@fused_loop
def _activation_rows(
    start: int, stop: int, gate: Array, up: Array, weights: Array, limit: float, out: Array
) -> None:
    bound = _F32(limit)
    for n in range(start, stop):
        weight = weights[n] if len(weights) else _F32(1)
        g, u, o = gate[n], up[n], out[n]
        for f in range(len(g)):
            # Comparisons, unlike min and max, let NaN through.
            x = bound if g[f] > bound else g[f]
            y = bound if u[f] > bound else (-bound if u[f] < -bound else u[f])
            o[f] = x / (_F32(1) + o[f]) * y * weight


@fused_loop
def _gradient_rows(
    start: int,
    stop: int,
    gate: Array,
    up: Array,
    weights: Array,
    grad: Array,
    limit: float,
    grad_gate: Array,
    grad_up: Array,
    grad_weights: Array,
) -> None:
    bound = _F32(limit)
    for n in range(start, stop):
        weight = weights[n] if len(weights) else _F32(1)
        g, u, d, out_g, out_u = gate[n], up[n], grad[n], grad_gate[n], grad_up[n]
        total = _F32(0)
        for f in range(len(g)):
            sigmoid = _F32(1) / (_F32(1) + out_g[f])
            silu = sigmoid * (bound if g[f] > bound else g[f])
            clamped = bound if u[f] > bound else (-bound if u[f] < -bound else u[f])
            total += d[f] * silu * clamped
            # d silu = sigmoid · (1 + x · (1 - sigmoid)) = sigmoid + silu · (1 - sigmoid)
            slope = (sigmoid + silu * (_F32(1) - sigmoid)) * clamped * d[f] * weight
            out_g[f] = _F32(0) if g[f] > bound else slope
            out_u[f] = _F32(0) if abs(u[f]) > bound else silu * d[f] * weight
        if len(weights):
            grad_weights[n] = total
