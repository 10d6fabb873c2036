"""Clamped SwiGLU whose backward goes through torch.compile."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from model.kernels.swiglu.eager import ClampedSwiGLU, activation_gradients
from model.kernels.torch_compile import CompiledFunction

swiglu_backward = CompiledFunction(activation_gradients)


class _ClampedSwiGLU(ClampedSwiGLU):
    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        grads = swiglu_backward(gate, up, weight, grad_out, ctx.limit)
        return grads[0], grads[1], None, grads[2]


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float, weight: Tensor | None = None) -> Tensor:
    """Computes `model.kernels.swiglu.clamped_swiglu`; only its backward is compiled."""
    return _ClampedSwiGLU.apply(gate, up, limit, weight)
