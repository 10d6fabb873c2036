"""Pooling of token windows into compressed entries (report §2.3.1, §2.3.2).

T tokens; C entries; m tokens of a window; K an entry's width; X = K, or 2K where windows overlap.
"""

from __future__ import annotations

from torch import Tensor

from model.kernels.compressor.eager import eager_pool_windows
from model.kernels.operations import EAGER, Choice


def pool_windows(
    values_TX: Tensor,
    gates_TX: Tensor,
    ape_mX: Tensor,
    first_token_C: Tensor,
    has_previous_C: Tensor,
    overlap: bool,
    choice: Choice = EAGER,
) -> Tensor:
    """Computes the softmax-gated mean over each window's tokens, per channel.

    Args:
        values_TX, gates_TX: projections of every token, X = K, or 2K where windows overlap.
        ape_mX: a bias of the gate for each position in the window.
        first_token_C: index of each window's first token; its m tokens follow.
        has_previous_C: whether the entry before belongs to the same sample.
        overlap: entry i pools window i-1 through channels [0:K] and its own window through [K:2K];
            without a previous window that half has weight 0.

    Returns:
        fp32 [C, K].
    """
    if choice.name == "triton":
        from model.kernels.compressor import pool_triton

        return pool_triton.pool_windows(
            values_TX, gates_TX, ape_mX, first_token_C, has_previous_C, overlap, **choice.blocks
        )
    return eager_pool_windows(values_TX, gates_TX, ape_mX, first_token_C, has_previous_C, overlap)
