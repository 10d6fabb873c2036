"""Clamped SwiGLU with a backward written by hand, on any device. n rows; F the inner width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def eager_clamped_swiglu(
    gate: Tensor, up: Tensor, limit: float, weight: Tensor | None = None
) -> Tensor:
    """Computes `clamped_swiglu` in fp32 and keeps its inputs for backward."""
    return ClampedSwiGLU.apply(gate, up, limit, weight)


def _sigmoid(x: Tensor) -> Tensor:
    # torch.sigmoid rounds differently in the tail of a thread's share, and which rows are there
    # depends on other samples' experts; torch.exp gives a number the same bits everywhere.
    return x.neg().exp_().add_(1).reciprocal_()


def activation(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float) -> Tensor:
    """Computes `clamped_swiglu` of tensors without gradients, [n, F]."""
    clamped = gate.float().clamp(max=limit)
    out = _sigmoid(clamped).mul_(clamped)
    out.mul_(up.float().clamp(-limit, limit))
    if weight is not None:
        out.mul_(weight[:, None])
    return out.to(gate.dtype)


def activation_gradients(
    gate: Tensor, up: Tensor, weight: Tensor | None, grad_out: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the gradients of gate [n, F], up [n, F] and weight [n] from the output's."""
    grad_out = grad_out.float()
    wide_gate, wide_up = gate.float(), up.float()
    clamped = wide_gate.clamp(max=limit)
    bounded = wide_up.clamp(-limit, limit)
    sigmoid = _sigmoid(clamped)
    silu = sigmoid * clamped
    grad_weight = None
    if weight is not None:
        grad_weight = torch.linalg.vecdot(grad_out, silu * bounded)
        grad_out = grad_out * weight[:, None]
    grad_up = (grad_out * silu).masked_fill_(wide_up.abs() > limit, 0)
    # d silu = sigmoid · (1 + x · (1 - sigmoid)) = sigmoid + silu · (1 - sigmoid)
    slope = torch.addcmul(sigmoid + silu, silu, sigmoid, value=-1)
    grad_gate = slope.mul_(grad_out).mul_(bounded).masked_fill_(wide_gate > limit, 0)
    return grad_gate.to(gate.dtype), grad_up.to(up.dtype), grad_weight


class ClampedSwiGLU(torch.autograd.Function):
    """Clamped SwiGLU that keeps its inputs, and nothing else, for backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, limit: float, weight: Tensor | None) -> Tensor:
        """Computes the activation, [n, F]."""
        ctx.save_for_backward(gate, up, weight)
        ctx.limit = limit
        return activation(gate, up, weight, limit)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of gate, up and weight."""
        gate, up, weight = ctx.saved_tensors
        grads = activation_gradients(gate, up, weight, grad_out, ctx.limit)
        return grads[0], grads[1], None, grads[2]
