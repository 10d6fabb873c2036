"""RMS normalisation (Zhang & Sennrich 2019) and rotary embedding, in fp32, in one pass.

Keys and compressed entries are normed and then rotated; apart, each would read and write them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import backend


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    rotation: Tensor | None = None,
    dtype: torch.dtype | None = None,
    reference: Callable[..., Tensor] | None = None,
) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dim, then rotated where asked.

    Args:
        x: [..., d], or [n, d] where it is rotated.
        weight: fp32 [d].
        rotation: as in `rotate`.
        dtype: of the result; x's by default. Nothing is rounded before the end.
        reference: what runs where Triton does not, in place of plain PyTorch.
    """
    dtype = dtype or x.dtype
    if backend.norm(x.device, x.dtype, x.shape[-1]).name == "triton":
        from model.kernels import norm_triton

        return norm_triton.rms_norm(x, weight, eps, rotation, dtype)
    return (reference or reference_rms_norm)(x, weight, eps, rotation, dtype)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the last R dims of ``x`` [n, ..., d] as adjacent pairs by ``rotation`` [n, R/2].

    The pair (x[2j], x[2j+1]) is one complex number; rotating back is rotating by the conjugate.
    """
    if backend.norm(x.device, x.dtype, x.shape[-1]).name == "triton":
        from model.kernels import norm_triton

        return norm_triton.rotate(x, rotation)
    return reference_rotate(x, rotation)


def reference_rms_norm(
    x: Tensor, weight: Tensor, eps: float, rotation: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`rms_norm` in plain PyTorch, on any device."""
    out = F.rms_norm(x.float(), weight.shape, weight, eps)
    if rotation is not None:
        out = reference_rotate(out, rotation)
    return out.to(dtype)


def reference_rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """`rotate` in plain PyTorch, on any device."""
    dims = 2 * rotation.shape[-1]
    plain, rotary = x[..., :-dims], x[..., -dims:]
    pairs = torch.view_as_complex(rotary.float().unflatten(-1, (-1, 2)).contiguous())
    shape = (rotation.shape[0], *[1] * (x.dim() - 2), rotation.shape[-1])
    turned = torch.view_as_real(pairs * rotation.view(shape)).flatten(-2)
    return torch.cat([plain, turned.to(x.dtype)], dim=-1)
