"""Core attention on a CPU: matmuls by torch, and between them fused loops, in fp32.

A query sees one range of the keys in its band's slice, and one range of entries or a selection;
loops run over these alone, and other logits become -inf.

T queries, n of a chunk; H heads; K their width; C entries; k selected entries of a query; c keys of
one part of a chunk; W the window; R rotary dims (cos and sin of every pair).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import host
from model.kernels.attention.chunks import LOG2E, Chunk
from model.kernels.attention.ranges import AttentionRanges
from model.kernels.host import Array, fused_loop

_F32 = np.float32
_LANES = 16


class Arguments(NamedTuple):
    """Arguments of a call, without its queries. ``entries_CK`` may be None."""

    kv_LK: Tensor
    entries_CK: Tensor | None
    sink_H: Tensor
    angles_TR: Tensor
    ranges: AttentionRanges
    selected_Tk: Tensor | None
    window: int
    eps: float


def forward(q_THK: Tensor, arguments: Arguments, chunks: list[Chunk]) -> tuple[Tensor, Tensor]:
    """Computes `model.kernels.attention.attention_with_lse2` without autograd."""
    out_THK, lse2_TH = q_THK.new_empty(q_THK.shape), q_THK.new_empty(q_THK.shape[:2])
    padded_kv = F.pad(arguments.kv_LK, (0, 0, arguments.window - 1, 0))
    for chunk in chunks:
        keys = _Keys(chunk, padded_kv, arguments)
        q_nHK = q_THK.new_empty(chunk.stop - chunk.start, *q_THK.shape[1:])
        _over_queries(_queries, chunk, q_nHK, q_THK, arguments.angles_TR, arguments.eps)
        parts = keys.logits(q_nHK)
        top_nH = q_THK.new_empty(q_nHK.shape[:2])
        _over_queries(_less_maximum, chunk, *parts, *keys.visible, arguments.sink_H, top_nH)
        for part in parts:
            part.exp2_()
        sums_nHK = keys.weighted_sum(parts)
        _over_queries(
            _finish,
            *(chunk, *parts, sums_nHK, top_nH, arguments.sink_H, arguments.angles_TR),
            *(out_THK, lse2_TH),
        )
    return out_THK, lse2_TH


def backward(
    q_THK: Tensor,
    arguments: Arguments,
    chunks: list[Chunk],
    out_THK: Tensor,
    lse2_TH: Tensor,
    grad_out_THK: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Returns the gradients of queries, keys, entries and sink."""
    entries_CK, sink_H = arguments.entries_CK, arguments.sink_H
    padded_kv = F.pad(arguments.kv_LK, (0, 0, arguments.window - 1, 0))
    grad_q, grad_kv = q_THK.new_empty(q_THK.shape), torch.zeros_like(padded_kv)
    grad_entries = None if entries_CK is None else torch.zeros_like(entries_CK)
    delta_TH = torch.linalg.vecdot(grad_out_THK, out_THK)
    for chunk in chunks:
        keys = _Keys(chunk, padded_kv, arguments)
        q_nHK = q_THK.new_empty(chunk.stop - chunk.start, *q_THK.shape[1:])
        grad_nHK = torch.empty_like(q_nHK)
        _over_queries(_queries, chunk, q_nHK, q_THK, arguments.angles_TR, arguments.eps)
        _over_queries(_rotated, chunk, grad_nHK, grad_out_THK, arguments.angles_TR)
        parts = keys.logits(q_nHK)
        _over_queries(_less_lse, chunk, *parts, *keys.visible, lse2_TH)
        for part in parts:
            part.exp2_()
        grads = keys.logits(grad_nHK)
        _over_queries(_logit_gradients, chunk, *grads, *parts, delta_TH)
        q_nHK.mul_(1 / LOG2E)
        keys.accumulate(grad_kv, grad_entries, (grads, q_nHK), (parts, grad_nHK))
        sums_nHK = keys.weighted_sum(grads)
        _over_queries(
            _query_gradients,
            *(chunk, sums_nHK, q_nHK, q_THK, arguments.angles_TR, arguments.eps, grad_q),
        )
    grad_sink = -(torch.exp2(sink_H * LOG2E - lse2_TH) * delta_TH).sum(0)
    return grad_q, grad_kv[arguments.window - 1 :], grad_entries, grad_sink


def _over_queries(
    kernel: Callable[..., None], chunk: Chunk, first: Tensor, *others: Tensor | float
) -> None:
    """Calls a kernel with (start, stop, first array, first query of the chunk, other arrays)."""
    host.over_rows(kernel, first, chunk.start, *others)


class _Keys:
    """What a chunk's queries may see: overlapping slices of the window's keys, and entries.

    Attributes:
        visible: the visible columns [low, high) of each query, int32 [n, 4]: of the window's slice
            and of the range of entries; and the selected entries, int32 [n, k], if any.
    """

    def __init__(self, chunk: Chunk, padded_kv: Tensor, arguments: Arguments) -> None:
        ranges, window, rows = arguments.ranges, arguments.window, chunk.rows
        self.chunk, self.bands = chunk, (chunk.stop - chunk.start) // chunk.band
        self.width, self.first_key = window - 1 + chunk.band, chunk.start + chunk.shift
        dim = padded_kv.shape[1]
        self.keys = padded_kv.as_strided(
            (self.bands, self.width, dim), (chunk.band * dim, dim, 1), self.first_key * dim
        )
        count = chunk.stop - chunk.start
        place = np.arange(count)
        first = place // chunk.band * chunk.band + self.first_key + 1 - window
        visible_n4 = torch.zeros(count, 4, dtype=torch.int32)
        visible = visible_n4.numpy()
        visible[:, 0] = np.maximum(ranges.window_start_T[rows].numpy() - first, 0)
        visible[:, 1] = place % chunk.band + window
        self.entries = self.selected = None
        self.range = slice(0, 0)
        low, high = ranges.host_entry_start_T, ranges.host_entry_end_T
        if arguments.entries_CK is not None and low is not None and high is not None:
            most = int((high[rows] - low[rows]).max())
            if arguments.selected_Tk is not None and most > arguments.selected_Tk.shape[1]:
                self.selected = arguments.selected_Tk[rows].contiguous()
                index = self.selected.clamp(min=0).flatten()
                keys = arguments.entries_CK.index_select(0, index)
                self.entries = keys.view(count, -1, dim)
            elif most > 0:
                self.range = slice(int(low[chunk.start]), int(high[rows].max()))
                self.entries = arguments.entries_CK[self.range]
                visible[:, 2] = low[rows] - self.range.start
                visible[:, 3] = high[rows] - self.range.start
        selected_nk = visible_n4[:, :0] if self.selected is None else self.selected
        self.visible = (visible_n4, selected_nk)

    def _banded(self, x: Tensor) -> Tensor:
        return x.view(self.bands, -1, x.shape[-1])

    def logits(self, x_nHK: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x·kᵀ for the window's keys and for entries, [n, H, c] each."""
        shape = x_nHK.shape[:2]
        window = torch.bmm(self._banded(x_nHK), self.keys.transpose(1, 2)).view(*shape, -1)
        if self.entries is None:
            return window, x_nHK.new_empty(*shape, 0)
        if self.selected is not None:
            return window, torch.bmm(x_nHK, self.entries.transpose(1, 2))
        return window, torch.mm(x_nHK.flatten(0, 1), self.entries.t()).view(*shape, -1)

    def weighted_sum(self, parts: tuple[Tensor, Tensor]) -> Tensor:
        """Returns Σ p·k over window and entries, [n, H, K]."""
        window, entries = parts
        shape = *window.shape[:2], self.keys.shape[-1]
        out = torch.bmm(self._banded(window), self.keys)
        if self.entries is not None and self.selected is not None:
            out.view(shape).baddbmm_(entries, self.entries)
        elif self.entries is not None:
            out.view(-1, shape[2]).addmm_(entries.flatten(0, 1), self.entries)
        return out.view(shape)

    def accumulate(
        self,
        grad_kv: Tensor,
        grad_entries: Tensor | None,
        *pairs: tuple[tuple[Tensor, Tensor], Tensor],
    ) -> None:
        """Adds Σ aᵀ·b over pairs of (a of both parts [n, H, c], b [n, H, K]) to the gradients."""
        (a, b), (c, d) = pairs
        left, right = (self._banded(x[0]).transpose(1, 2) for x in (a, c))
        grad = torch.bmm(left, self._banded(b)).baddbmm_(right, self._banded(d))
        _add_bands(self.first_key, self.chunk.band, *map(host.array, (grad, grad_kv)))
        if self.entries is None:
            return
        assert grad_entries is not None
        if self.selected is None:
            part = grad_entries[self.range]
            part.addmm_(a[1].flatten(0, 1).t(), b.flatten(0, 1))
            part.addmm_(c[1].flatten(0, 1).t(), d.flatten(0, 1))
            return
        grad = torch.bmm(a[1].transpose(1, 2), b).baddbmm_(c[1].transpose(1, 2), d)
        _add_selected(*map(host.array, (self.visible[1], grad, grad_entries)))


@fused_loop
def _queries(
    start: int, stop: int, out: Array, first: int, q: Array, angles: Array, eps: float
) -> None:
    """Norms, scales (to base-2 logits) and rotates."""
    _, heads, dims = q.shape
    plain = dims - angles.shape[1]
    for n in range(start, stop):
        angle = angles[first + n]
        for h in range(heads):
            x, o = q[first + n, h], out[n, h]
            total = _F32(0)
            for d in range(dims):
                total += x[d] * x[d]
            rstd = _F32(1) / math.sqrt(total / _F32(dims) + _F32(eps))
            scale = rstd * _F32(LOG2E / math.sqrt(dims))
            for d in range(dims):
                o[d] = x[d] * scale
            for d in range(plain, dims, 2):
                even, odd, cos, sin = o[d], o[d + 1], angle[d - plain], angle[d - plain + 1]
                o[d] = even * cos - odd * sin
                o[d + 1] = even * sin + odd * cos


@fused_loop
def _rotated(start: int, stop: int, out: Array, first: int, x: Array, angles: Array) -> None:
    _, heads, dims = x.shape
    plain = dims - angles.shape[1]
    for n in range(start, stop):
        angle = angles[first + n]
        for h in range(heads):
            g, o = x[first + n, h], out[n, h]
            for d in range(plain):
                o[d] = g[d]
            for d in range(plain, dims, 2):
                cos, sin = angle[d - plain], angle[d - plain + 1]
                o[d] = g[d] * cos - g[d + 1] * sin
                o[d + 1] = g[d] * sin + g[d + 1] * cos


@fused_loop
def _query_gradients(
    start: int,
    stop: int,
    sums: Array,
    first: int,
    scaled: Array,
    q: Array,
    angles: Array,
    eps: float,
    grad_q: Array,
) -> None:
    """Turns Σ ds·k into the raw queries' gradient."""
    _, heads, dims = q.shape
    plain = dims - angles.shape[1]
    for n in range(start, stop):
        angle = angles[first + n]
        for h in range(heads):
            x, g, s, o = q[first + n, h], sums[n, h], scaled[n, h], grad_q[first + n, h]
            total, along = _F32(0), _F32(0)
            for d in range(dims):
                total += x[d] * x[d]
                along += g[d] * s[d]
            rstd = _F32(1) / math.sqrt(total / _F32(dims) + _F32(eps))
            # the component of the gradient along q, which the norm removes
            along *= rstd * rstd / _F32(dims)
            scale = rstd / _F32(math.sqrt(dims))
            for d in range(plain, dims, 2):
                even, odd, cos, sin = g[d], g[d + 1], angle[d - plain], angle[d - plain + 1]
                g[d] = even * cos + odd * sin
                g[d + 1] = odd * cos - even * sin
            for d in range(dims):
                o[d] = g[d] * scale - x[d] * along


@fused_loop
def _maximum(x: Array, tops: Array) -> Any:
    """Returns the largest number, or -inf; 16 running maxima are one vector instruction."""
    top = _F32(-np.inf)
    if len(x) < _LANES:
        for c in range(len(x)):
            top = max(top, x[c])
        return top
    for b in range(_LANES):
        tops[b] = x[len(x) - _LANES + b]
    for first in range(0, len(x) - _LANES, _LANES):
        for b in range(_LANES):
            tops[b] = x[first + b] if x[first + b] > tops[b] else tops[b]
    for b in range(_LANES):
        top = max(top, tops[b])
    return top


@fused_loop
def _less_maximum(
    start: int,
    stop: int,
    window: Array,
    first: int,
    entries: Array,
    visible: Array,
    selected: Array,
    sink: Array,
    top_nH: Array,
) -> None:
    """Subtracts each row's maximum, the sink's logit included."""
    heads, width, count = window.shape[1], window.shape[2], entries.shape[2]
    tops = np.empty(_LANES, _F32)
    for n in range(start, stop):
        low, high, first_entry, last_entry = visible[n]
        for h in range(heads):
            w, e = window[n, h], entries[n, h]
            for c in range(low):
                w[c] = -np.inf
            for c in range(high, width):
                w[c] = -np.inf
            if selected.shape[1]:
                for c in range(count):
                    e[c] = e[c] if selected[n, c] >= 0 else _F32(-np.inf)
            else:
                for c in range(first_entry):
                    e[c] = -np.inf
                for c in range(last_entry, count):
                    e[c] = -np.inf
            top = max(sink[h] * _F32(LOG2E), _maximum(w, tops), _maximum(e, tops))
            top_nH[n, h] = top
            for c in range(low, high):
                w[c] -= top
            for c in range(count):
                e[c] -= top


@fused_loop
def _less_lse(
    start: int,
    stop: int,
    window: Array,
    first: int,
    entries: Array,
    visible: Array,
    selected: Array,
    lse2: Array,
) -> None:
    """Subtracts each row's log-sum-exp."""
    heads, width, count = window.shape[1], window.shape[2], entries.shape[2]
    for n in range(start, stop):
        low, high, first_entry, last_entry = visible[n]
        for h in range(heads):
            w, e, lse = window[n, h], entries[n, h], lse2[first + n, h]
            for c in range(low):
                w[c] = -np.inf
            for c in range(low, high):
                w[c] -= lse
            for c in range(high, width):
                w[c] = -np.inf
            for c in range(count):
                if selected.shape[1]:
                    hidden = selected[n, c] < 0
                else:
                    hidden = c < first_entry or c >= last_entry
                e[c] = _F32(-np.inf) if hidden else e[c] - lse


@fused_loop
def _finish(
    start: int,
    stop: int,
    window: Array,
    first: int,
    entries: Array,
    sums: Array,
    top_nH: Array,
    sink: Array,
    angles: Array,
    out: Array,
    lse2: Array,
) -> None:
    """Divides by the probabilities' sum and rotates back."""
    _, heads, dims = sums.shape
    plain = dims - angles.shape[1]
    for n in range(start, stop):
        angle = angles[first + n]
        for h in range(heads):
            w, e, s, o = window[n, h], entries[n, h], sums[n, h], out[first + n, h]
            top = top_nH[n, h]
            total = _F32(2.0 ** (sink[h] * _F32(LOG2E) - top))
            for c in range(len(w)):
                total += w[c]
            for c in range(len(e)):
                total += e[c]
            lse2[first + n, h] = top + _F32(math.log2(total))
            factor = _F32(1) / total
            for d in range(dims):
                o[d] = s[d] * factor
            for d in range(plain, dims, 2):
                even, odd, cos, sin = o[d], o[d + 1], angle[d - plain], angle[d - plain + 1]
                o[d] = even * cos + odd * sin
                o[d + 1] = odd * cos - even * sin


@fused_loop
def _logit_gradients(
    start: int,
    stop: int,
    window: Array,
    first: int,
    entries: Array,
    window_p: Array,
    entries_p: Array,
    delta: Array,
) -> None:
    """Computes ds = p · (dp - Σ dp·p) in place of dp."""
    for n in range(start, stop):
        for h in range(window.shape[1]):
            g, p, d = window[n, h], window_p[n, h], delta[first + n, h]
            for c in range(len(g)):
                g[c] = (g[c] - d) * p[c]
            g, p = entries[n, h], entries_p[n, h]
            for c in range(len(g)):
                g[c] = (g[c] - d) * p[c]


@fused_loop
def _add_bands(first: int, step: int, grad: Array, out: Array) -> None:
    for band in range(grad.shape[0]):
        for c in range(grad.shape[1]):
            g, o = grad[band, c], out[first + band * step + c]
            for d in range(len(g)):
                o[d] += g[d]


@fused_loop
def _add_selected(selected: Array, grad: Array, out: Array) -> None:
    for n in range(grad.shape[0]):
        for c in range(grad.shape[1]):
            if selected[n, c] >= 0:
                g, o = grad[n, c], out[selected[n, c]]
                for d in range(len(g)):
                    o[d] += g[d]
