"""RMS normalisation and rotary embedding with torch's fused functions, on any device.

n rows; d their width; R rotary dims (R/2 complex numbers).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_rms_norm(
    x: Tensor, weight: Tensor, eps: float, rotation: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Computes `model.kernels.norm.rms_norm` in fp32 and rounds once."""
    out = F.rms_norm(x.float(), weight.shape, weight, eps)
    if rotation is not None:
        out = eager_rotate(out, rotation)
    return out.to(dtype)


def eager_rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Computes `model.kernels.norm.rotate` as a product of complex numbers."""
    dims = 2 * rotation.shape[-1]
    plain, rotary = x[..., :-dims], x[..., -dims:]
    pairs = torch.view_as_complex(rotary.float().unflatten(-1, (-1, 2)).contiguous())
    shape = (rotation.shape[0], *[1] * (x.dim() - 2), rotation.shape[-1])
    rotated = torch.view_as_real(pairs * rotation.view(shape)).flatten(-2)
    return torch.cat([plain, rotated.to(x.dtype)], dim=-1)
