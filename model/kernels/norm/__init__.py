"""RMS normalisation (Zhang & Sennrich 2019) and rotary embedding, in fp32, in one pass.

Keys and compressed entries are normed and then rotated; done separately, each pass would read and
write the whole tensor. n rows; d their width; R rotary dims (R/2 complex numbers).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.norm.eager import eager_rms_norm, eager_rotate
from model.kernels.operations import EAGER, Choice


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    rotation: Tensor | None = None,
    dtype: torch.dtype | None = None,
    choice: Choice = EAGER,
) -> Tensor:
    """Computes x / sqrt(mean(x²) + eps) · weight over the last dim, then rotates it.

    Args:
        x: [..., d], or [n, d] with a rotation.
        weight: fp32 [d].
        rotation: as in `rotate`; None for none.
        dtype: of the result; x's by default. Nothing is rounded before the end.
    """
    dtype = dtype or x.dtype
    if choice.name == "triton":
        from model.kernels.norm import norm_triton

        return norm_triton.rms_norm(x, weight, eps, rotation, dtype, **choice.blocks)
    if choice.name == "compile":
        from model.kernels.norm import compiled  # imports torch's compiler, which takes long

        return compiled.rms_norm(x, weight, eps, rotation, dtype)
    return eager_rms_norm(x, weight, eps, rotation, dtype)


def rotate(x: Tensor, rotation: Tensor, choice: Choice = EAGER) -> Tensor:
    """Rotates the last R dims of ``x`` [n, ..., d] as adjacent pairs by ``rotation`` [n, R/2].

    The pair (x[2j], x[2j+1]) is one complex number; rotating back is rotating by the conjugate.
    """
    if choice.name == "triton":
        from model.kernels.norm import norm_triton

        return norm_triton.rotate(x, rotation, **choice.blocks)
    return eager_rotate(x, rotation)
