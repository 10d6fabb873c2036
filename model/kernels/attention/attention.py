"""Core attention: one softmax over a window of tokens and compressed entries, with a sink.

Report 2.3.1-2.3.3. Queries are RMS-normalised per head and rotated here, and the output is rotated
back here, because both cost more than they compute when they pass through memory on their own.
Backward recomputes the probabilities block by block, so nothing quadratic is ever stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels import backend
from model.kernels.attention.eager import reference_attention, reference_entry_mass
from model.kernels.attention.ranges import AttentionRanges


def attention(
    q_THK: Tensor,
    kv_TK: Tensor,
    entries_CK: Tensor | None,
    sink_H: Tensor,
    rotation_TR: Tensor,
    ranges: AttentionRanges,
    selected_Tk: Tensor | None = None,
    *,
    window: int,
    norm_eps: float,
) -> Tensor:
    """V4's multi-query attention with one shared key-value head.

    Args:
        q_THK: queries before their norm and rotation.
        kv_TK: the keys, which are also the values, normed and rotated; at least the queries' own.
        entries_CK: compressed entries, normed and rotated.
        sink_H: logit of each head's sink, which takes probability and gives no value.
        rotation_TR: complex [T, R/2], the rotation at each query's position.
        ranges: the visible range of tokens and of entries per query.
        selected_Tk: the entries kept for each query (-1: none); without it a query sees its whole
            range. A query that sees at most k entries must have all of them selected.
        window: W, the most tokens that a query sees.

    Returns:
        [T, H, K] in q's dtype: softmax(q·k / sqrt(K)) · k, its last R dims rotated back by the
        query's own position.
    """
    return attention_with_lse(
        q_THK,
        kv_TK,
        entries_CK,
        sink_H,
        rotation_TR,
        ranges,
        selected_Tk,
        window=window,
        norm_eps=norm_eps,
    )[0]


def attention_with_lse(
    q_THK: Tensor,
    kv_TK: Tensor,
    entries_CK: Tensor | None,
    sink_H: Tensor,
    rotation_TR: Tensor,
    ranges: AttentionRanges,
    selected_Tk: Tensor | None = None,
    *,
    window: int,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    """`attention` and lse fp32 [T, H], from which `entry_mass` gets probabilities back.

    lse is the base-2 logarithm of the softmax's denominator, sink included; it has no gradient.
    """
    if backend.attention(q_THK.device, q_THK.dtype, q_THK.shape[-1]).name == "triton":
        from model.kernels.attention import forward_triton as attention_triton

        return attention_triton.attention(
            q_THK,
            kv_TK,
            entries_CK,
            sink_H,
            rotation_TR,
            ranges,
            selected_Tk,
            norm_eps=norm_eps,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    return reference_attention(
        q_THK,
        kv_TK,
        entries_CK,
        sink_H,
        rotation_TR,
        ranges,
        selected_Tk,
        window=window,
        norm_eps=norm_eps,
    )


@torch.no_grad()
def entry_mass(
    q_THK: Tensor,
    entries_CK: Tensor,
    lse_TH: Tensor,
    rotation_TR: Tensor,
    ranges: AttentionRanges,
    selected_Tk: Tensor | None = None,
    *,
    norm_eps: float,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """How much of a query's attention each entry gets, summed over heads: the indexer's teacher.

    Args:
        q_THK, entries_CK, rotation_TR, ranges, norm_eps: as `attention` had them.
        lse_TH: as `attention_with_lse` returned it, so that the window and the sink have a part in
            the denominator.
        selected_Tk: entries of each query (-1: none); without it all of [start, stop).
        start, stop: a block of entries; the end is the last entry's by default.

    Returns:
        fp32 [T, k], or [T, stop - start] with zeros where a query does not see an entry.
    """
    arguments = (q_THK, entries_CK, lse_TH, rotation_TR, ranges, selected_Tk)
    if backend.attention(q_THK.device, q_THK.dtype, q_THK.shape[-1]).name == "triton":
        from model.kernels.attention import mass_triton as attention_mass_triton

        return attention_mass_triton.entry_mass(
            *arguments, norm_eps=norm_eps, start=start, stop=stop
        )
    return reference_entry_mass(*arguments, norm_eps=norm_eps, start=start, stop=stop)
