"""Clamped SwiGLU (report §4.2.3; docs/architecture-v4.md), optionally weighted by row.

n rows; F the experts' inner width.
"""

from __future__ import annotations

from torch import Tensor

from model.kernels.operations import EAGER, Choice
from model.kernels.swiglu.eager import eager_clamped_swiglu


def clamped_swiglu(
    gate: Tensor,
    up: Tensor,
    limit: float,
    weight: Tensor | None = None,
    choice: Choice = EAGER,
) -> Tensor:
    """Computes silu(min(gate, limit)) · clamp(up, -limit, limit) · weight.

    Args:
        gate, up: [n, F].
        weight: fp32 [n], or None for 1.

    Returns:
        [n, F] in gate's dtype, computed in fp32.
    """
    if choice.name == "triton":
        from model.kernels.swiglu import swiglu_triton

        return swiglu_triton.clamped_swiglu(gate, up, limit, weight, **choice.blocks)
    if choice.name == "compile":
        from model.kernels.swiglu import compiled  # imports torch's compiler, which takes long

        return compiled.clamped_swiglu(gate, up, limit, weight)
    return eager_clamped_swiglu(gate, up, limit, weight)
