"""RMS normalisation and rotary embedding as formulas, for comparison in any dtype.

n rows; d their width; R rotary dims (R/2 complex numbers).
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_rms_norm(x: Tensor, weight: Tensor, eps: float, rotation: Tensor | None = None) -> Tensor:
    """Computes x / sqrt(mean(x²) + eps) · weight over the last dim, then rotates it."""
    out = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return out if rotation is None else naive_rotate(out, rotation)


def naive_rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates adjacent pairs of the last R dims of x [n, ..., d] by ``rotation`` [n, R/2]."""
    dims = 2 * rotation.shape[1]
    shape = (len(x), *[1] * (x.dim() - 2), -1)
    cos, sin = (part.to(x.dtype).view(shape) for part in (rotation.real, rotation.imag))
    even, odd = x[..., -dims::2], x[..., -dims + 1 :: 2]
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return torch.cat([x[..., :-dims], pairs.flatten(-2)], -1)
