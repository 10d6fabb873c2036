"""RMS norm through torch.compile. n rows; D their width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.kernels.norm.eager import eager_rotate
from model.kernels.torch_compile import CompiledFunction


def _norm_forward(
    x_nD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    wide_nD = x_nD.float()
    rstd_n1 = torch.rsqrt(wide_nD.square().mean(-1, keepdim=True) + eps)
    return (wide_nD * rstd_n1 * weight_D).to(dtype), rstd_n1


def _norm_backward(
    x_nD: Tensor, weight_D: Tensor, rstd_n1: Tensor, grad_nD: Tensor
) -> tuple[Tensor, Tensor]:
    unit_nD, grad_nD = x_nD.float() * rstd_n1, grad_nD.float()
    scaled_nD = grad_nD * weight_D
    # the component of the gradient along x, which the norm removes
    projection_n1 = (scaled_nD * unit_nD).mean(-1, keepdim=True)
    grad_x_nD = (scaled_nD - unit_nD * projection_n1) * rstd_n1
    return grad_x_nD.to(x_nD.dtype), (grad_nD * unit_nD).sum(0)


norm_forward, norm_backward = CompiledFunction(_norm_forward), CompiledFunction(_norm_backward)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        out, rstd = norm_forward(x.flatten(0, -2), weight, eps, dtype)
        ctx.save_for_backward(x, weight, rstd)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        rows = x.flatten(0, -2), weight, rstd, grad_out.flatten(0, -2)
        grad_x, grad_weight = norm_backward(*rows)
        return grad_x.view(x.shape), grad_weight, None, None


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, rotation: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Computes `model.kernels.norm.rms_norm`, compiled; the rotation stays eager."""
    if rotation is None:
        return _RMSNorm.apply(x, weight, eps, dtype)
    return eager_rotate(_RMSNorm.apply(x, weight, eps, torch.float32), rotation).to(dtype)
