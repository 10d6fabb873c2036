"""Core attention: one softmax over a window of tokens and compressed entries, with a sink.

Report 2.3.1-2.3.3. Queries are RMS-normalised per head and rotated here, and the output is rotated
back here, because both cost more than they compute when they pass through memory on their own.
Backward recomputes the probabilities block by block, so nothing quadratic is ever stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BLOCK_ROWS = 512
"""Query-head pairs handled at once: the logits of one block then stay in a core's cache."""


@dataclass(frozen=True)
class AttentionRanges:
    """What each query may see: tokens [window_start, t], entries [entry_start, entry_end).

    ``host_*`` are the same numbers on the host; all of them never decrease with t. The entry
    ranges are None in a layer that compresses nothing.
    """

    window_start_T: Tensor
    host_window_start_T: np.ndarray
    entry_start_T: Tensor | None = None
    entry_end_T: Tensor | None = None
    host_entry_start_T: np.ndarray | None = None
    host_entry_end_T: np.ndarray | None = None


def attention(
    q_THK: Tensor,
    kv_TK: Tensor,
    entries_CK: Tensor | None,
    sink_H: Tensor,
    rotation_TR: Tensor,
    ranges: AttentionRanges,
    selected_Tk: Tensor | None = None,
    *,
    norm_eps: float,
) -> Tensor:
    """V4's multi-query attention with one shared key-value head.

    Args:
        q_THK: queries before their norm and rotation.
        kv_TK: the tokens' keys, which are also the values, normed and rotated.
        entries_CK: compressed entries, normed and rotated.
        sink_H: logit of each head's sink, which takes probability and gives no value.
        rotation_TR: complex [T, R/2], the rotation at each query's position.
        ranges: the visible range of tokens and of entries per query.
        selected_Tk: the entries kept for each query (-1: none); without it a query sees its whole
            range. A query that sees at most k entries must have all of them selected.

    Returns:
        [T, H, K] in q's dtype: softmax(q·k / sqrt(K)) · k, its last R dims rotated back by the
        query's own position.
    """
    if entries_CK is None or entries_CK.shape[0] == 0:
        entries_CK, selected_Tk = None, None
    return _Attention.apply(
        q_THK, kv_TK, entries_CK, sink_H, rotation_TR, ranges, selected_Tk, norm_eps
    )


@dataclass(frozen=True)
class _Block:
    """Queries [start, stop), the tokens from ``key_start`` on and the entries they may see."""

    start: int
    stop: int
    key_start: int
    entry_start: int
    entry_stop: int
    gather: bool


def _blocks(
    ranges: AttentionRanges, heads: int, topk: int | None, has_entries: bool
) -> list[_Block]:
    tokens = len(ranges.host_window_start_T)
    step = max(_BLOCK_ROWS // heads, 16)
    blocks = []
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        first = last = 0
        gather = False
        if has_entries:
            first = int(ranges.host_entry_start_T[start])
            last = int(ranges.host_entry_end_T[start:stop].max())
            if topk is not None:
                visible = (
                    ranges.host_entry_end_T[start:stop] - ranges.host_entry_start_T[start:stop]
                )
                gather = int(visible.max()) > topk
        key_start = int(ranges.host_window_start_T[start])
        blocks.append(_Block(start, stop, key_start, first, max(first, last), gather))
    return blocks


class _Queries:
    """A block's queries, ready for the dot product, and the way back for their gradient."""

    def __init__(self, q_nHK: Tensor, rotation_nR: Tensor, eps: float) -> None:
        self.raw = q_nHK.float()
        self.rotation = rotation_nR[:, None]
        self.scale = self.raw.shape[-1] ** -0.5
        mean_square = torch.linalg.vector_norm(self.raw, dim=-1, keepdim=True).square_()
        self.rstd = mean_square.div_(self.raw.shape[-1]).add_(eps).rsqrt_()
        self.ready = rotate_(self.raw * (self.rstd * self.scale), self.rotation)

    def backward(self, grad_ready: Tensor) -> Tensor:
        """Gradient of the raw queries given that of ``ready``, which is overwritten."""
        along = torch.linalg.vecdot(grad_ready, self.ready)[..., None] / self.raw.shape[-1]
        grad = rotate_(grad_ready, self.rotation.conj())
        grad.mul_(self.rstd * self.scale)
        return grad.addcmul_(self.raw, self.rstd.square() * along, value=-1)


def rotate_(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate in place the last dims of a contiguous fp32 ``x`` as adjacent pairs."""
    rotary = x[..., -2 * rotation.shape[-1] :].unflatten(-1, (-1, 2))
    torch.view_as_complex(rotary).mul_(rotation)
    return x


class _Keys:
    """What one block attends to: window tokens and a range of entries, or gathered entries."""

    def __init__(self, block: _Block, kv_TK, entries_CK, selected_Tk, ranges) -> None:
        self.block = block
        rows = slice(block.start, block.stop)
        keys = kv_TK[block.key_start : block.stop].float()
        device = keys.device
        index = torch.arange(block.key_start, block.stop, device=device)
        token_T = index[block.start - block.key_start :, None]
        hidden = (index < ranges.window_start_T[rows, None]) | (index > token_T)
        self.window = len(index)
        self.picked: Tensor | None = None
        if block.gather:
            picked_nk = selected_Tk[rows]
            hidden = torch.cat([hidden, picked_nk < 0], dim=1)
            self.picked = picked_nk.clamp(min=0).flatten()
            gathered = entries_CK.index_select(0, self.picked).float()
            self.gathered_nkK = gathered.view(*picked_nk.shape, -1)
        elif block.entry_stop > block.entry_start:
            seen = slice(block.entry_start, block.entry_stop)
            keys = torch.cat([keys, entries_CK[seen].float()])
            index = torch.arange(block.entry_start, block.entry_stop, device=device)
            start, end = ranges.entry_start_T[rows, None], ranges.entry_end_T[rows, None]
            hidden = torch.cat([hidden, (index < start) | (index >= end)], dim=1)
        self.shared_cK = keys
        self.hidden_nc = hidden

    def dot(self, x_nHK: Tensor) -> Tensor:
        """x · kᵀ over everything the block attends to, [n, H, c]."""
        n, heads, dim = x_nHK.shape
        shared = self.shared_cK.shape[0]
        result = x_nHK.new_empty(n, heads, self.hidden_nc.shape[1])
        out = result.view(n * heads, -1)[:, :shared]
        torch.mm(x_nHK.view(-1, dim), self.shared_cK.t(), out=out)
        if self.picked is not None:
            result[..., shared:] = torch.bmm(x_nHK, self.gathered_nkK.transpose(1, 2))
        return result

    def logits(self, ready_nHK: Tensor) -> Tensor:
        """Logits [n, H, c] with what a query may not see at -inf."""
        return self.dot(ready_nHK).masked_fill_(self.hidden_nc[:, None], float("-inf"))

    def weighted_sum(self, p_nHc: Tensor) -> Tensor:
        """p · k, [n, H, K]."""
        n, heads, _ = p_nHc.shape
        shared = self.shared_cK.shape[0]
        out = torch.mm(p_nHc.view(n * heads, -1)[:, :shared], self.shared_cK).view(n, heads, -1)
        if self.picked is not None:
            out.baddbmm_(p_nHc[..., shared:], self.gathered_nkK)
        return out

    def accumulate(self, grad_kv_TK, grad_entries_CK, pairs) -> None:
        """Add Σ aᵀ·b over ``pairs`` of a [n, H, c] and b [n, H, K] to the keys' gradients."""
        shared = self.shared_cK.shape[0]
        grad = torch.zeros_like(self.shared_cK)
        for a_nHc, b_nHK in pairs:
            grad.addmm_(a_nHc.flatten(0, 1)[:, :shared].t(), b_nHK.flatten(0, 1))
        grad_kv_TK[self.block.key_start : self.block.stop] += grad[: self.window]
        if self.picked is not None:
            grad = torch.zeros_like(self.gathered_nkK)
            for a_nHc, b_nHK in pairs:
                grad.baddbmm_(a_nHc[..., shared:].transpose(1, 2), b_nHK)
            grad_entries_CK.index_add_(0, self.picked, grad.flatten(0, 1))
        elif shared > self.window:
            seen = slice(self.block.entry_start, self.block.entry_stop)
            grad_entries_CK[seen] += grad[self.window :]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, kv, entries, sink, rotation, ranges, selected, eps) -> Tensor:
        heads = q.shape[1]
        topk = None if selected is None else selected.shape[1]
        ctx.blocks = _blocks(ranges, heads, topk, entries is not None)
        out_THK = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse_TH = q.new_empty(q.shape[:2], dtype=torch.float32)
        sink_H = sink.float()
        for block in ctx.blocks:
            rows = slice(block.start, block.stop)
            queries = _Queries(q[rows], rotation[rows], eps)
            keys = _Keys(block, kv, entries, selected, ranges)
            p_nHc = keys.logits(queries.ready)
            top_nH = torch.maximum(p_nHc.amax(-1), sink_H)
            p_nHc.sub_(top_nH[..., None]).exp_()
            total_nH = p_nHc.sum(-1) + torch.exp(sink_H - top_nH)
            out = keys.weighted_sum(p_nHc).div_(total_nH[..., None])
            out_THK[rows] = rotate_(out, queries.rotation.conj())
            lse_TH[rows] = top_nH + total_nH.log()
        ctx.ranges, ctx.eps = ranges, eps
        ctx.save_for_backward(q, kv, entries, sink, rotation, selected, out_THK, lse_TH)
        return out_THK

    @staticmethod
    def backward(ctx: Any, grad_out_THK: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, entries, sink, rotation, selected, out_THK, lse_TH = ctx.saved_tensors
        grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_kv = torch.zeros_like(kv, dtype=torch.float32)
        grad_entries = None if entries is None else torch.zeros_like(entries, dtype=torch.float32)
        grad_sink = torch.zeros_like(sink, dtype=torch.float32)
        for block in ctx.blocks:
            rows = slice(block.start, block.stop)
            queries = _Queries(q[rows], rotation[rows], ctx.eps)
            keys = _Keys(block, kv, entries, selected, ctx.ranges)
            grad_nHK = grad_out_THK[rows].to(torch.float32, copy=True)
            # Rotating both back leaves their product as it was, so take it before rotating.
            along_nH = torch.linalg.vecdot(grad_nHK, out_THK[rows].float())
            grad_nHK = rotate_(grad_nHK.contiguous(), queries.rotation)
            p_nHc = keys.logits(queries.ready).sub_(lse_TH[rows, :, None]).exp_()
            ds_nHc = keys.dot(grad_nHK).sub_(along_nH[..., None]).mul_(p_nHc)
            grad_sink -= (torch.exp(sink.float() - lse_TH[rows]) * along_nH).sum(0)
            keys.accumulate(grad_kv, grad_entries, [(ds_nHc, queries.ready), (p_nHc, grad_nHK)])
            grad_q[rows] = queries.backward(keys.weighted_sum(ds_nHc))
        if grad_entries is not None:
            grad_entries = grad_entries.to(entries.dtype)
        return grad_q, grad_kv.to(kv.dtype), grad_entries, grad_sink.to(sink.dtype), *[None] * 4
