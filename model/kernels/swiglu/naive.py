"""Clamped SwiGLU as a formula (report §4.2.3), for comparison in any dtype.

n rows; F the experts' inner width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_clamped_swiglu(
    gate: Tensor, up: Tensor, limit: float, weight: Tensor | None = None
) -> Tensor:
    """Computes silu(min(gate, limit)) · clamp(up, -limit, limit) · weight, [n, F].

    The gradient passes at the limit and is 0 beyond it. (torch.minimum would halve the gradient of
    a tie.)
    """
    gate = torch.where(gate > limit, torch.full_like(gate, limit), gate)
    up = torch.where(up > limit, torch.full_like(up, limit), up)
    up = torch.where(up < -limit, torch.full_like(up, -limit), up)
    out = gate / (1 + torch.exp(-gate)) * up
    return out if weight is None else out * weight[:, None]
