"""Pointwise work between matmuls that torch.compile fuses: norms, activation, streams.

Each compiled function is pure and sees no autograd: it is called inside a hand-written forward or
backward, so this file decides what is saved for backward, and grad mode, module mode and
recomputation cause no recompilation. Steps that fusing did not speed up on a CPU stay eager
(docs/performance.md).

A function is compiled at its first call, once for all sizes; calls with fewer than two rows, for
which torch.compile would specialise, run eagerly, and so do calls on the meta device.

Rounding differs from that of the eager versions: sums run in another order, and exp may come from
another math library.

T tokens; N streams; D their width; n rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels.hyper_connection.eager import ReadStreams
from model.kernels.norm.eager import eager_rotate
from model.kernels.swiglu.eager import ClampedSwiGLU, activation_gradients


class CompiledFunction:
    """Compiles a pure function once for all sizes.

    Dim 0 of the first argument is the row dimension. Graph breaks and exceeding the recompile limit
    are errors.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._compiled = torch.compile(function, fullgraph=True, dynamic=True)

    def __call__(self, *inputs: Any) -> Any:
        """Returns the function's results."""
        first = inputs[0]
        if first.is_meta or len(first) < 2:
            return self.function(*inputs)
        return self._compiled(*[_unspecialised(x, first.device) for x in inputs])


def _unspecialised(value: Any, device: torch.device) -> Any:
    """Returns an argument in a form that does not trigger specialisation.

    Floats become tensors; tensors are detached and contiguous.
    """
    if isinstance(value, float):
        # torch 2.13 may specialise on a float's value, and its on-disk cache then returns
        # that code to a run with another value.
        return torch.full((), value, device=device)
    return value.detach().contiguous() if isinstance(value, Tensor) else value


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


def _sum(weights_TN: Tensor, streams_TND: Tensor) -> Tensor:
    """Computes Σ_j weight_j · X_j in fp32, [T, D]; unrolled: one loop reads each stream once."""
    pairs = zip(weights_TN.unbind(1), streams_TND.float().unbind(1), strict=True)
    total, *others = [weight_T[:, None] * x_TD for weight_T, x_TD in pairs]
    for other in others:
        total = total + other
    return total


def _dots(streams_TND: Tensor, y_TD: Tensor) -> Tensor:
    """Computes X_j · y in fp32, [T, N]."""
    return (streams_TND.float() * y_TD.float()[:, None]).sum(-1)


def _write_forward(streams_TND: Tensor, y_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
    y_TD = y_TD.float()
    pairs = zip(comb_TNN.unbind(2), post_TN.unbind(1), strict=True)
    new = [_sum(comb_TN, streams_TND) + post_T[:, None] * y_TD for comb_TN, post_T in pairs]
    return torch.stack(new, 1).to(streams_TND.dtype)


def _write_backward(
    streams_TND: Tensor, y_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor, grad_TND: Tensor
) -> tuple[Tensor, ...]:
    grad_streams = torch.stack([_sum(comb_TN, grad_TND) for comb_TN in comb_TNN.unbind(1)], 1)
    grad_comb = torch.stack([_dots(grad_TND, x_TD) for x_TD in streams_TND.unbind(1)], 1)
    grad_y = _sum(post_TN, grad_TND)
    return (
        grad_streams.to(streams_TND.dtype),
        grad_y.to(y_TD.dtype),
        _dots(grad_TND, y_TD),
        grad_comb,
    )


norm_forward, norm_backward = CompiledFunction(_norm_forward), CompiledFunction(_norm_backward)
swiglu_backward = CompiledFunction(activation_gradients)
write_forward, write_backward = CompiledFunction(_write_forward), CompiledFunction(_write_backward)
pre_gradient = CompiledFunction(_dots)


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


class _ClampedSwiGLU(ClampedSwiGLU):
    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        grads = swiglu_backward(gate, up, weight, grad_out, ctx.limit)
        return grads[0], grads[1], None, grads[2]


class _ReadStreams(ReadStreams):
    @staticmethod
    def backward(ctx: Any, grad_read: Tensor, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grad_pre = pre_gradient(saved[0], grad_read)
        return ReadStreams.gradients(ctx, saved, grad_pre, grad_read, *grad_outputs)


class _WriteStreams(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        ctx.save_for_backward(streams, y, post, comb)
        return write_forward(streams, y, post, comb)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
        return write_backward(*ctx.saved_tensors, grad_out)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, rotation: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Computes `model.kernels.norm.rms_norm`, compiled; the rotation stays eager."""
    if rotation is None:
        return _RMSNorm.apply(x, weight, eps, dtype)
    return eager_rotate(_RMSNorm.apply(x, weight, eps, torch.float32), rotation).to(dtype)


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float, weight: Tensor | None = None) -> Tensor:
    """Computes `model.kernels.swiglu.clamped_swiglu`; only its backward is compiled."""
    return _ClampedSwiGLU.apply(gate, up, limit, weight)


def read_streams(*inputs: Any) -> Any:
    """Computes `model.kernels.hyper_connection.read_streams`.

    With ``iterations`` None it computes `collapse_streams`. Only the gradient of pre is compiled.
    """
    return _ReadStreams.apply(*inputs)


def write_streams(streams_TND: Tensor, y_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
    """Computes `model.kernels.hyper_connection.write_streams`, compiled."""
    return _WriteStreams.apply(streams_TND, y_TD, post_TN, comb_TNN)
