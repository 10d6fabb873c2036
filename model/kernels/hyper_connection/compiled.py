"""Reading and writing residual streams through torch.compile.

T tokens; N streams; D their width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.kernels.hyper_connection.eager import ReadStreams
from model.kernels.torch_compile import CompiledFunction


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


write_forward, write_backward = CompiledFunction(_write_forward), CompiledFunction(_write_backward)
pre_gradient = CompiledFunction(_dots)


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


def read_streams(*inputs: Any) -> Any:
    """Computes `model.kernels.hyper_connection.read_streams`.

    With ``iterations`` None it computes `collapse_streams`. Only the gradient of pre is compiled.
    """
    return _ReadStreams.apply(*inputs)


def write_streams(streams_TND: Tensor, y_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
    """Computes `model.kernels.hyper_connection.write_streams`, compiled."""
    return _WriteStreams.apply(streams_TND, y_TD, post_TN, comb_TNN)
