"""RMS normalisation and rotary embedding: fused loops on a CPU, torch's functions elsewhere.

n rows; d their width; R rotary dims (R/2 complex numbers).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.kernels import host
from model.kernels.norm import host as fused


def eager_rms_norm(
    x: Tensor, weight: Tensor, eps: float, rotation: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Computes `model.kernels.norm.rms_norm` in fp32 and rounds once; saves x and 1/rms."""
    return _RMSNorm.apply(x, weight, eps, rotation, dtype)


def eager_rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Computes `model.kernels.norm.rotate` as a product of complex numbers."""
    if host.runs(x):
        return _Rotate.apply(x, rotation)
    dims = 2 * rotation.shape[-1]
    plain, rotary = x[..., :-dims], x[..., -dims:]
    pairs = torch.view_as_complex(rotary.float().unflatten(-1, (-1, 2)).contiguous())
    shape = (rotation.shape[0], *[1] * (x.dim() - 2), rotation.shape[-1])
    rotated = torch.view_as_real(pairs * rotation.view(shape)).flatten(-2)
    return torch.cat([plain, rotated.to(x.dtype)], dim=-1)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        eps: float,
        rotation: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        rows = x.flatten(0, -2).float()
        if host.runs(rows, weight):
            out, rstd = fused.norm_forward(rows, weight, eps, rotation)
        else:
            rstd = rows.square().mean(-1).add_(eps).rsqrt_()
            out = rows * rstd[:, None] * weight
            out = out if rotation is None else eager_rotate(out, rotation)
        ctx.save_for_backward(x, weight, rstd, rotation)
        return out.view(x.shape).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd, rotation = ctx.saved_tensors
        rows, grad = x.flatten(0, -2).float(), grad.flatten(0, -2).float()
        if host.runs(rows, weight):
            grads = fused.norm_backward(rows, weight, rstd, rotation, grad)
        else:
            grad = grad if rotation is None else eager_rotate(grad, rotation.conj())
            unit = rows * rstd[:, None]
            scaled = grad * weight
            # the component of the gradient along x, which the norm removes
            projection = torch.linalg.vecdot(scaled, unit)[:, None] / rows.shape[1]
            grads = (scaled - unit * projection) * rstd[:, None], (grad * unit).sum(0)
        return grads[0].view(x.shape).to(x.dtype), grads[1], None, None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(rotation)
        return fused.rotate(x, rotation, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rotation,) = ctx.saved_tensors
        return fused.rotate(grad, rotation, -1.0), None
