"""Hyper-connections in Triton, forward and backward; compared with ``naive.py``.

All arithmetic is fp32. The kernels, in the order of a sub-layer:

    _project        X [T, N·D] times fnᵀ [N·D, M] and Σ X², M <= 24; the columns are divided over
                    programs, whose parts the next kernel adds in a fixed order
    _coefficients   pre, post, comb of every token from these; Sinkhorn's steps in registers
    _mix            x = Σ pre_j X_j
    _write          X'_k = post_k y + Σ comb_jk X_j

and in backward:

    _write_backward          gradients of X, y, post, comb; a program has all of a token's columns
    _mix_backward            gradient of pre, Σ X_j · grad_x
    _coefficients_backward   through Sinkhorn to the gradient of the projections
    _project_backward        gradient of X, and that of fn in parts that are added in a fixed order

No two programs accumulate into the same element, so runs are bit-identical. Keeping a token's X
between _project and _mix would take 2·N·D bytes of registers per token, leaving room for few tokens
per program, so fn (1.5 MB) would be re-read for each such group: more traffic from L2 than X costs
from memory. So X is read twice.

Bytes per token in bf16 with N = 4; the matmuls (2·24·N·D FLOPs, two or three times in TF32) and
Sinkhorn's 1,500 FLOPs take less time:

                       minimum                  as written
    read, forward      2·(N + 1)·D              2·(2·N + 1)·D
    write, forward     2·(2·N + 1)·D            the same
    write, backward    2·(3·N + 2)·D            the same
    read, backward     2·(2·N + 1)·D            2·(3·N + 2)·D

    roofline per token at 3.35 TB/s
    (H100), ns                          minimum, Flash / Pro    as written    measured
    read, forward                            12 /  21             22 /  39    not yet timed
    write, forward                           22 /  39             22 /  39    not yet timed
    write, backward                          34 /  60             34 /  60    not yet timed
    read, backward                           22 /  39             34 /  60    not yet timed

T tokens; N streams; D their width; M = (2+N)·N coefficients, or N of them in the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.kernels import backend
from model.kernels.hyper_connection.coefficients_triton import coefficients, coefficients_backward
from model.kernels.hyper_connection.mix_triton import mix, mix_backward, write, write_backward
from model.kernels.hyper_connection.project_triton import project, project_backward


def read_streams(
    streams_TND: Tensor,
    fn: Tensor,
    base_M: Tensor,
    scale: Tensor,
    *,
    norm_eps: float,
    hc_eps: float,
    iterations: int | None,
) -> Any:
    """Computes `model.kernels.hyper_connection.read_streams` in Triton.

    With ``iterations`` None it computes `collapse_streams`.

    Raises:
        UnsupportedError: a GPU cannot run this device, dtype or number of streams.
        ValueError: the number of streams is not a power of two.
    """
    _check(streams_TND)
    return _Read.apply(streams_TND.contiguous(), fn, base_M, scale, norm_eps, hc_eps, iterations)


def write_streams(streams_TND: Tensor, y_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
    """Computes `model.kernels.hyper_connection.write_streams` in Triton.

    Raises the same errors as `read_streams`.
    """
    _check(streams_TND)
    return _Write.apply(
        streams_TND.contiguous(), y_TD.contiguous(), post_TN.contiguous(), comb_TNN.contiguous()
    )


def _check(streams_TND: Tensor) -> None:
    count = streams_TND.shape[1]
    backend.hyper_connection(streams_TND.device, streams_TND.dtype, count)
    if count & (count - 1):
        raise ValueError(f"{count} residual streams; Triton supports powers of two")


class _Read(torch.autograd.Function):
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
        fn, base, scale = (x.float().contiguous() for x in (fn, base, scale))
        _, count, dim = streams.shape
        # The first iteration normalises columns only.
        ctx.steps = None if iterations is None else iterations - 1
        ctx.width, ctx.hc_eps = count * dim, hc_eps
        w, rstd, pre, post, comb = coefficients(
            *project(streams, fn),
            base,
            scale,
            ctx.width,
            streams=count,
            steps=ctx.steps,
            norm_eps=norm_eps,
            hc_eps=hc_eps,
        )
        read = mix(streams, pre)
        ctx.save_for_backward(streams, fn, base, scale, w, rstd, pre)
        return read if iterations is None else (read, post, comb)

    @staticmethod
    def backward(ctx: Any, grad_read: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        streams, fn, base, scale, w, rstd, pre = ctx.saved_tensors
        grad_read = grad_read.contiguous()
        # The head has neither post nor comb.
        grad_post, grad_comb = [x.contiguous() for x in grads] or (None, None)
        grad_w, norm_term, grad_base, grad_scale = coefficients_backward(
            w,
            base,
            scale,
            rstd,
            mix_backward(streams, grad_read),
            grad_post,
            grad_comb,
            ctx.width,
            steps=ctx.steps,
            hc_eps=ctx.hc_eps,
        )
        grad_streams, grad_fn = project_backward(streams, fn, grad_w, norm_term, pre, grad_read)
        return grad_streams, grad_fn, grad_base, grad_scale, None, None, None


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        ctx.save_for_backward(streams, y, post, comb)
        return write(streams, y, post, comb)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
        streams, y, post, comb = ctx.saved_tensors
        return write_backward(streams, y, post, comb, grad_out.contiguous())
