"""Hyper-connections with the kernels of tile-kernels, DeepSeek's own (optional).

Its functions (github.com/deepseek-ai/TileKernels) compute what `naive.py` does. Two differences:
``fn`` is rounded to TF32, 11 bits; and backward adds each part of the streams' gradient in bf16.
Its autograd functions for a whole sub-layer pass the streams' gradient from one to the other as an
attribute of the streams' storage, which recomputation, copies and pipeline stages would lose.
What is used here does not: reading without that addition, and writing through the forward and
backward beneath its autograd function.

T tokens; N streams; D their width; M = (2+N)·N coefficients, or N of them in the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.kernels import backend

_STREAMS, _COLUMNS = 4, 256
"""The number of streams, and what N·D has to be a multiple of."""


def read_streams(
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

    Raises UnsupportedError if tile-kernels is not installed or cannot run this.
    """
    _check(streams_TND)
    from tile_kernels.modeling.mhc import ops

    streams = streams_TND.contiguous()[None]
    fn, base_M, scale = fn.float().contiguous(), base_M.float(), scale.float()
    count = streams.shape[2]
    wide = torch.nn.functional.pad(fn, (0, 0, 0, count * (count + 2) - len(fn)))
    mixes = ops.mhc_pre_norm_fn(streams, wide.contiguous(), None, norm_eps, fuse_grad_acc=False)
    if iterations is None:
        pre = ops.mhc_head_compute_mix(
            mixes[..., :count].contiguous(), scale.reshape(1), base_M, hc_eps
        )
        return ops.mhc_pre_apply_mix(streams, pre[..., None])[0]
    pre, post, comb = ops.mhc_pre_split_mixes(mixes, scale, base_M, count, 2.0, hc_eps)
    comb = ops.sinkhorn_normalize(comb, repeat=iterations, eps=hc_eps)
    return ops.mhc_pre_apply_mix(streams, pre)[0], post[0, ..., 0], comb[0]


def write_streams(streams_TND: Tensor, y_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
    """Computes `model.kernels.hyper_connection.write_streams`.

    Raises the same error as `read_streams`.
    """
    _check(streams_TND)
    tensors = (y_TD, streams_TND, post_TN[..., None], comb_TNN)
    written: Tensor = _Write.apply(*(x.contiguous()[None] for x in tensors))
    return written[0]


def _check(streams_TND: Tensor) -> None:
    backend.library("tile_kernels")
    _, count, dim = streams_TND.shape
    unsupported = None
    if count != _STREAMS:
        unsupported = f"it takes 4 streams, not {count}"
    elif count * dim % _COLUMNS:
        unsupported = f"{count} streams of width {dim} are not a multiple of {_COLUMNS} numbers"
    elif streams_TND.dtype != torch.bfloat16:
        unsupported = f"it takes torch.bfloat16, not {streams_TND.dtype}"
    if unsupported is not None:
        raise backend.UnsupportedError(
            f"hyper_connections: tile-kernels cannot run this, {unsupported}"
        )


class _Write(torch.autograd.Function):
    # All tensors have a leading dimension of 1, and post [1, T, N, 1] has one at the end as well.

    @staticmethod
    def forward(ctx: Any, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        from tile_kernels.mhc.post_kernel import mhc_post_fwd

        ctx.save_for_backward(y, streams, post, comb)
        out: Tensor = mhc_post_fwd(y, streams, post, comb)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        from tile_kernels.mhc.post_kernel import mhc_post_bwd

        grads = mhc_post_bwd(*ctx.saved_tensors, grad.contiguous(), fuse_grad_acc=False)
        return tuple(grads)
