"""Clamped SwiGLU (report 2.1 and 4.2.3), optionally weighted per row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels import backend


def clamped_swiglu(
    gate: Tensor,
    up: Tensor,
    limit: float,
    weight: Tensor | None = None,
    reference: Callable[..., Tensor] | None = None,
) -> Tensor:
    """silu(min(gate, limit)) · clamp(up, -limit, limit) · weight.

    Args:
        gate, up: [n, F].
        weight: fp32 [n], or None for 1.
        reference: what runs where Triton does not, in place of plain PyTorch.

    Returns:
        [n, F] in gate's dtype, computed in fp32.
    """
    if backend.experts(gate.device, gate.dtype).name == "triton":
        from model.kernels import swiglu_triton

        return swiglu_triton.clamped_swiglu(gate, up, limit, weight)
    return (reference or reference_clamped_swiglu)(gate, up, limit, weight)


def reference_clamped_swiglu(
    gate: Tensor, up: Tensor, limit: float, weight: Tensor | None = None
) -> Tensor:
    """`clamped_swiglu` in plain PyTorch, on any device."""
    return ClampedSwiGLU.apply(gate, up, limit, weight)


def _sigmoid(x: Tensor) -> Tensor:
    # torch.sigmoid rounds differently in the tail of a thread's share, and which rows are there
    # depends on other samples' experts; torch.exp gives a number the same bits everywhere.
    return x.neg().exp_().add_(1).reciprocal_()


def activation(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float) -> Tensor:
    """`clamped_swiglu` of tensors without gradients."""
    clamped = gate.float().clamp(max=limit)
    out = _sigmoid(clamped).mul_(clamped)
    out.mul_(up.float().clamp(-limit, limit))
    if weight is not None:
        out.mul_(weight[:, None])
    return out.to(gate.dtype)


def activation_gradients(
    gate: Tensor, up: Tensor, weight: Tensor | None, grad_out: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of gate, up and weight, from what was given and the result's."""
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
    """`clamped_swiglu`, which keeps what it was given."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, limit: float, weight: Tensor | None) -> Tensor:
        """[n, F]."""
        ctx.save_for_backward(gate, up, weight)
        ctx.limit = limit
        return activation(gate, up, weight, limit)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Of gate, up and weight."""
        gate, up, weight = ctx.saved_tensors
        grads = activation_gradients(gate, up, weight, grad_out, ctx.limit)
        return grads[0], grads[1], None, grads[2]
