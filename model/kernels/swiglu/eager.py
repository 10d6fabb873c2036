"""Clamped SwiGLU with a backward written by hand, fused on a CPU. n rows; F the inner width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels import host
from model.kernels.swiglu import host as fused


def eager_clamped_swiglu(
    gate: Tensor, up: Tensor, limit: float, weight: Tensor | None = None
) -> Tensor:
    """Computes `model.kernels.swiglu.clamped_swiglu` in fp32; saves only its inputs."""
    return ClampedSwiGLU.apply(gate, up, limit, weight)


def _sigmoid(x: Tensor) -> Tensor:
    # torch.sigmoid rounds differently in the scalar tail of a thread's vectorised chunk, and which
    # rows fall there depends on other samples' experts; torch.exp has no such difference.
    return x.neg().exp_().add_(1).reciprocal_()


def activation(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float) -> Tensor:
    """Computes `clamped_swiglu` without autograd, [n, F]."""
    gate_clamped = gate.float().clamp(max=limit)
    out = _sigmoid(gate_clamped).mul_(gate_clamped)
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
    gate_clamped = wide_gate.clamp(max=limit)
    up_clamped = wide_up.clamp(-limit, limit)
    sigmoid = _sigmoid(gate_clamped)
    silu = sigmoid * gate_clamped
    grad_weight = None
    if weight is not None:
        grad_weight = torch.linalg.vecdot(grad_out, silu * up_clamped)
        grad_out = grad_out * weight[:, None]
    grad_up = (grad_out * silu).masked_fill_(wide_up.abs() > limit, 0)
    # d silu = sigmoid · (1 + x · (1 - sigmoid)) = sigmoid + silu · (1 - sigmoid)
    slope = torch.addcmul(sigmoid + silu, silu, sigmoid, value=-1)
    grad_gate = slope.mul_(grad_out).mul_(up_clamped).masked_fill_(wide_gate > limit, 0)
    return grad_gate.to(gate.dtype), grad_up.to(up.dtype), grad_weight


class ClampedSwiGLU(torch.autograd.Function):
    """Clamped SwiGLU that saves only its inputs for backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, limit: float, weight: Tensor | None) -> Tensor:
        """Computes the activation, [n, F]."""
        ctx.save_for_backward(gate, up, weight)
        ctx.limit = limit
        if host.runs(gate, up, weight):
            return fused.activation(gate, up, weight, limit)
        return activation(gate, up, weight, limit)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of gate, up and weight."""
        gate, up, weight = ctx.saved_tensors
        fusable = host.runs(gate, up, weight, grad_out)
        gradients: Callable[..., Any] = fused.gradients if fusable else activation_gradients
        grads = gradients(gate, up, weight, grad_out, ctx.limit)
        return grads[0], grads[1], None, grads[2]
