"""Pointwise work between matmuls that torch.compile fuses: norms, activation, streams.

Programs are of pure functions of tensors without gradients, each called in a forward or a backward
that is written by hand: so this file decides what is saved for backward, and gradients, modes and
recomputation need no further programs. Steps that fusing did not speed up on a CPU stay
eager (docs/performance.md).

A program is compiled at its first call and serves all sizes; calls with fewer than two rows, for
which torch.compile would specialise, run eagerly, and so do calls on the meta device.

Rounding differs from that of the eager versions: sums run in another order, and the exponential may
be another library's.

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


class Program:
    """A pure function of tensors, rows first, as one compiled program for all sizes.

    A graph break, or more programs than torch allows one function, is an error.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._compiled = torch.compile(function, fullgraph=True, dynamic=True)

    def __call__(self, *inputs: Any) -> Any:
        """Returns the function's results."""
        first = inputs[0]
        if first.is_meta or len(first) < 2:
            return self.function(*inputs)
        return self._compiled(*[_plain(x, first.device) for x in inputs])


def _plain(value: Any, device: torch.device) -> Any:
    """Returns an argument in a form for which one program serves all values."""
    if isinstance(value, float):
        # torch 2.13 may take a number for a constant, and its cache on disk then gives the program
        # to a run with another number.
        return torch.full((), value, device=device)
    return value.detach().contiguous() if isinstance(value, Tensor) else value


def _normalised(
    x_nD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    wide_nD = x_nD.float()
    rstd_n1 = torch.rsqrt(wide_nD.square().mean(-1, keepdim=True) + eps)
    return (wide_nD * rstd_n1 * weight_D).to(dtype), rstd_n1


def _normalised_gradients(
    x_nD: Tensor, weight_D: Tensor, rstd_n1: Tensor, grad_nD: Tensor
) -> tuple[Tensor, Tensor]:
    unit_nD, grad_nD = x_nD.float() * rstd_n1, grad_nD.float()
    turned_nD = grad_nD * weight_D
    along_n1 = (turned_nD * unit_nD).mean(-1, keepdim=True)
    grad_x_nD = (turned_nD - unit_nD * along_n1) * rstd_n1
    return grad_x_nD.to(x_nD.dtype), (grad_nD * unit_nD).sum(0)


def _sum(weights_TN: Tensor, streams_TND: Tensor) -> Tensor:
    """Σ_j weight_j · X_j in fp32, [T, D], written out so that one loop reads each stream once."""
    pairs = zip(weights_TN.unbind(1), streams_TND.float().unbind(1), strict=True)
    total, *others = [weight_T[:, None] * x_TD for weight_T, x_TD in pairs]
    for other in others:
        total = total + other
    return total


def _dots(streams_TND: Tensor, y_TD: Tensor) -> Tensor:
    """X_j · y in fp32, [T, N]."""
    return (streams_TND.float() * y_TD.float()[:, None]).sum(-1)


def _written(streams_TND: Tensor, y_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
    y_TD = y_TD.float()
    pairs = zip(comb_TNN.unbind(2), post_TN.unbind(1), strict=True)
    new = [_sum(comb_TN, streams_TND) + post_T[:, None] * y_TD for comb_TN, post_T in pairs]
    return torch.stack(new, 1).to(streams_TND.dtype)


def _written_gradients(
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


normalised, normalised_gradients = Program(_normalised), Program(_normalised_gradients)
activation_gradients_program = Program(activation_gradients)
written, written_gradients = Program(_written), Program(_written_gradients)
reading_gradients = Program(_dots)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        out, rstd = normalised(x.flatten(0, -2), weight, eps, dtype)
        ctx.save_for_backward(x, weight, rstd)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        rows = x.flatten(0, -2), weight, rstd, grad_out.flatten(0, -2)
        grad_x, grad_weight = normalised_gradients(*rows)
        return grad_x.view(x.shape), grad_weight, None, None


class _ClampedSwiGLU(ClampedSwiGLU):
    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        grads = activation_gradients_program(gate, up, weight, grad_out, ctx.limit)
        return grads[0], grads[1], None, grads[2]


class _ReadStreams(ReadStreams):
    @staticmethod
    def backward(ctx: Any, grad_read: Tensor, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grad_pre = reading_gradients(saved[0], grad_read)
        return ReadStreams.gradients(ctx, saved, grad_pre, grad_read, *grad_outputs)


class _WriteStreams(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        ctx.save_for_backward(streams, y, post, comb)
        return written(streams, y, post, comb)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
        return written_gradients(*ctx.saved_tensors, grad_out)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, rotation: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Computes `rms_norm`; a rotation runs eagerly."""
    if rotation is None:
        return _RMSNorm.apply(x, weight, eps, dtype)
    return eager_rotate(_RMSNorm.apply(x, weight, eps, torch.float32), rotation).to(dtype)


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float, weight: Tensor | None = None) -> Tensor:
    """Computes `clamped_swiglu`; only its backward has a program."""
    return _ClampedSwiGLU.apply(gate, up, limit, weight)


def read_streams(*inputs: Any) -> Any:
    """Computes `read_streams`; only its backward has a program."""
    return _ReadStreams.apply(*inputs)


def write_streams(streams_TND: Tensor, y_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
    """Computes `write_streams`."""
    return _WriteStreams.apply(streams_TND, y_TD, post_TN, comb_TNN)
