"""Clamped SwiGLU (report §4.2.3; docs/architecture-v4.md), optionally weighted by row.

n rows; F the experts' inner width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from model.kernels import backend
from model.kernels.swiglu.eager import eager_clamped_swiglu


def clamped_swiglu(
    gate: Tensor,
    up: Tensor,
    limit: float,
    weight: Tensor | None = None,
    eager: Callable[..., Tensor] = eager_clamped_swiglu,
) -> Tensor:
    """Computes silu(min(gate, limit)) · clamp(up, -limit, limit) · weight.

    Args:
        gate, up: [n, F].
        weight: fp32 [n], or None for 1.
        eager: the implementation used where Triton does not run.

    Returns:
        [n, F] in gate's dtype, computed in fp32.
    """
    if backend.swiglu_and_combine(gate.device, gate.dtype).name == "triton":
        from model.kernels.swiglu import swiglu_triton

        return swiglu_triton.clamped_swiglu(gate, up, limit, weight)
    return eager(gate, up, limit, weight)
