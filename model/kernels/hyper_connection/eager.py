"""Hyper-connections as few torch calls, with a backward written by hand, on any device.

T tokens; N streams; D their width; M = (2+N)·N coefficients, or N of them in the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.kernels import host
from model.kernels.hyper_connection import host as fused


def eager_read_streams(
    streams_TND: Tensor,
    fn: Tensor,
    base_M: Tensor,
    scale: Tensor,
    norm_eps: float,
    hc_eps: float,
    iterations: int | None,
) -> Any:
    """Computes `model.kernels.hyper_connection.read_streams`.

    With ``iterations`` None it computes `collapse_streams`.
    """
    return ReadStreams.apply(streams_TND, fn, base_M, scale, norm_eps, hc_eps, iterations)


def eager_write_streams(
    streams_TND: Tensor, y_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor
) -> Tensor:
    """Computes `model.kernels.hyper_connection.write_streams`."""
    return _WriteStreams.apply(streams_TND, y_TD, post_TN, comb_TNN)


def coefficients(
    w: Tensor, base: Tensor, scale: Tensor, hc_eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes pre [T, N], post [T, N] and comb [T, N, N] from the projections w [T, M]."""
    streams = round((1 + w.shape[1]) ** 0.5) - 1
    sizes = [streams, streams, streams * streams]
    pre, post, comb = w.split(sizes, dim=1)
    pre_base, post_base, comb_base = base.split(sizes)
    pre = torch.sigmoid(pre * scale[0] + pre_base) + hc_eps
    post = 2 * torch.sigmoid(post * scale[1] + post_base)
    comb = (comb * scale[2] + comb_base).unflatten(1, (streams, streams))
    return pre, post, sinkhorn(comb, hc_eps, iterations)


def sinkhorn(logits_TNN: Tensor, eps: float, iterations: int) -> Tensor:
    """Applies a softmax over the last dim, then normalises columns and rows in turn.

    The first step divides by the sum over dim -2, each of the ``iterations`` - 1 others by the sum
    over dim -1 and then over dim -2; every divisor has ``eps`` added, as has the softmax.
    """
    return _Sinkhorn.apply(logits_TNN, eps, iterations)


class _Sinkhorn(torch.autograd.Function):
    # Works on [N, N, T], so that each of the many small steps runs over contiguous memory.

    @staticmethod
    def forward(ctx: Any, logits_TNN: Tensor, eps: float, iterations: int) -> Tensor:
        soft = torch.softmax(logits_TNN.permute(1, 2, 0).contiguous(), dim=1)
        x = soft + eps
        steps = []
        for dim in _normalised_dims(iterations):
            divisor = x.sum(dim, keepdim=True).add_(eps)
            x = x / divisor
            if ctx.needs_input_grad[0]:
                steps += [x, divisor]
        ctx.iterations = iterations
        ctx.save_for_backward(soft, *steps)
        return x.permute(2, 0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, grad_TNN: Tensor) -> tuple[Tensor | None, ...]:
        soft, *steps = ctx.saved_tensors
        grad = grad_TNN.permute(1, 2, 0).contiguous()
        dims = _normalised_dims(ctx.iterations)
        for dim, y, divisor in reversed(list(zip(dims, steps[::2], steps[1::2], strict=True))):
            # y = x / (Σx + eps), so dx = (dy - Σ dy·y) / (Σx + eps)
            grad = grad.sub((grad * y).sum(dim, keepdim=True)).div_(divisor)
        grad = (grad - (grad * soft).sum(1, keepdim=True)).mul_(soft)
        return grad.permute(2, 0, 1).contiguous(), None, None


def _normalised_dims(iterations: int) -> list[int]:
    return [0] + [1, 0] * (iterations - 1)


class ReadStreams(torch.autograd.Function):
    """Norm, projection, coefficients and weighted read.

    With ``iterations`` None it computes only pre and the weighted read (the head).
    """

    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        norm_eps: float,
        hc_eps: float,
        iterations: int | None,
    ) -> Any:
        """Returns what `eager_read_streams` does."""
        flat = streams.flatten(1).float()
        ctx.hc_eps, ctx.iterations = hc_eps, iterations
        if host.runs(flat, fn, base, scale):
            w = torch.mm(flat, fn.t())
            wide = flat.view(streams.shape)
            rstd, read, outputs = fused.read_forward(
                wide, w, base, scale, norm_eps, hc_eps, iterations
            )
            ctx.save_for_backward(streams, fn, base, scale, w, rstd)
            return (read.to(streams.dtype), *outputs) if iterations else read.to(streams.dtype)
        square = torch.linalg.vector_norm(flat, dim=1, keepdim=True).square_()
        rstd = square.div_(flat.shape[1]).add_(norm_eps).rsqrt_()
        w = torch.mm(flat, fn.float().t()).mul_(rstd)
        ctx.save_for_backward(streams, fn, base, scale, w, rstd)
        outputs = ReadStreams.all_coefficients(w, base.float(), scale.float(), hc_eps, iterations)
        read = torch.bmm(outputs[0][:, None], flat.view(streams.shape))[:, 0]
        return (read.to(streams.dtype), *outputs[1:]) if iterations else read.to(streams.dtype)

    @staticmethod
    def all_coefficients(
        w: Tensor, base: Tensor, scale: Tensor, hc_eps: float, iterations: int | None
    ) -> tuple[Tensor, ...]:
        """Computes the streams' coefficients from their projections."""
        if iterations is None:
            return (torch.sigmoid(w * scale + base) + hc_eps,)
        return coefficients(w, base, scale, hc_eps, iterations)

    @staticmethod
    def backward(ctx: Any, grad_read: Tensor, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of streams, fn, base and scale."""
        saved = ctx.saved_tensors  # unpacked once: a second time fails under recomputation
        if host.runs(*saved[1:]):
            streams, fn, base, scale, w, rstd = saved
            grads = fused.read_gradients(
                streams.float(),
                w,
                rstd,
                fn,
                base,
                scale,
                ctx.hc_eps,
                ctx.iterations,
                (grad_read.float(), *grad_outputs),
            )
            return grads[0].to(streams.dtype), *grads[1:], None, None, None
        grad_pre = torch.linalg.vecdot(saved[0].float(), grad_read.float()[:, None])
        return ReadStreams.gradients(ctx, saved, grad_pre, grad_read, *grad_outputs)

    @staticmethod
    def gradients(
        ctx: Any, saved: Any, grad_pre: Tensor, grad_read: Tensor, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Computes the rest of backward, given the gradient of pre."""
        streams, fn, base, scale, w, rstd = saved
        wide = streams.float()
        grad_read = grad_read.float()
        with torch.enable_grad():
            leaves = [x.detach().float().requires_grad_() for x in (w, base, scale)]
            w_leaf, base_leaf, scale_leaf = leaves
            outputs = ReadStreams.all_coefficients(
                w_leaf, base_leaf, scale_leaf, ctx.hc_eps, ctx.iterations
            )
            grads = torch.autograd.grad(outputs, leaves, (grad_pre, *grad_outputs))
        grad_w, grad_base, grad_scale = grads
        flat = wide.flatten(1)
        # w = (X · fnᵀ) · rstd, and d rstd / dX = -rstd³ · X / (N·D): the norm adds -norm_term · X
        norm_term = torch.linalg.vecdot(grad_w, w)[:, None] * rstd.square() / flat.shape[1]
        grad_projected = grad_w * rstd
        grad_streams = torch.mul(outputs[0].detach()[..., None], grad_read[:, None]).flatten(1)
        grad_streams.addmm_(grad_projected, fn.float()).addcmul_(flat, norm_term, value=-1)
        grad_fn = torch.mm(grad_projected.t(), flat).to(fn.dtype)
        grad_streams = grad_streams.view_as(streams).to(streams.dtype)
        parameters = (grad_fn, grad_base.to(base.dtype), grad_scale.to(scale.dtype))
        return grad_streams, *parameters, None, None, None


class _WriteStreams(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        ctx.save_for_backward(streams, y, post, comb)
        if host.runs(post, comb):
            return fused.write_forward(streams.float(), y.float(), post, comb).to(streams.dtype)
        out = torch.bmm(comb.transpose(1, 2), streams.float())
        return out.addcmul_(post[..., None], y.float()[:, None]).to(streams.dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
        streams, y, post, comb = ctx.saved_tensors
        grad_out = grad_out.float()
        if host.runs(post, comb):
            grads = fused.write_gradients(streams.float(), y.float(), post, comb, grad_out)
            return grads[0].to(streams.dtype), grads[1].to(y.dtype), *grads[2:]
        grad_streams = torch.bmm(comb, grad_out).to(streams.dtype)
        grad_comb = torch.bmm(streams.float(), grad_out.transpose(1, 2))
        grad_post = torch.linalg.vecdot(grad_out, y.float()[:, None])
        grad_y = torch.bmm(post[:, None], grad_out)[:, 0].to(y.dtype)
        return grad_streams, grad_y, grad_post, grad_comb
