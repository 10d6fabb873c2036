"""Pooling of token windows into compressed entries (report 2.3.1, 2.3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import backend


def pool_windows(
    values_TX: Tensor,
    gates_TX: Tensor,
    ape_mX: Tensor,
    first_token_C: Tensor,
    has_previous_C: Tensor,
    overlap: bool,
) -> Tensor:
    """Softmax-gated mean over each window's tokens, per channel.

    Args:
        values_TX, gates_TX: projections of every token, X = K, or 2K where windows overlap.
        ape_mX: a bias of the gate for each place in the window.
        first_token_C: index of each window's first token; its m tokens follow.
        has_previous_C: whether the entry before belongs to the same sample.
        overlap: entry i also pools window i-1, which it reads through channels [0:K] while it
            reads its own through [K:2K]; without a previous window that half has weight 0.

    Returns:
        fp32 [C, K].
    """
    where = (first_token_C, has_previous_C, overlap)
    if backend.compressor(values_TX.device, values_TX.dtype, ape_mX.shape[0]).name == "triton":
        from model.kernels import compressor_triton

        return compressor_triton.pool_windows(values_TX, gates_TX, ape_mX, *where)
    return reference_pool_windows(values_TX, gates_TX, ape_mX, *where)


def reference_pool_windows(
    values_TX: Tensor,
    gates_TX: Tensor,
    ape_mX: Tensor,
    first_token_C: Tensor,
    has_previous_C: Tensor,
    overlap: bool,
) -> Tensor:
    """`pool_windows` in plain PyTorch, on any device."""
    m = ape_mX.shape[0]
    token_C_m = (first_token_C[:, None] + torch.arange(m, device=first_token_C.device)).flatten()
    values_CmX = values_TX.index_select(0, token_C_m).float().unflatten(0, (-1, m))
    gates_CmX = gates_TX.index_select(0, token_C_m).float().unflatten(0, (-1, m)) + ape_mX.float()
    if overlap:
        values_CmX = _with_previous(values_CmX)
        gates_CmX = _with_previous(gates_CmX)
        no_previous = F.pad(~has_previous_C[:, None].expand(-1, m), (0, m))
        gates_CmX = gates_CmX.masked_fill(no_previous[..., None], float("-inf"))
    return (gates_CmX.softmax(dim=1) * values_CmX).sum(dim=1)


def _with_previous(x_CmX: Tensor) -> Tensor:
    """[C, m, 2K] to [C, 2m, K]: the previous window's first half, then the own second half."""
    previous, own = x_CmX.chunk(2, dim=-1)
    previous = F.pad(previous, (0, 0, 0, 0, 1, 0))[:-1]
    return torch.cat([previous, own], dim=1)
