"""Core attention and the entries' probability mass with torch's functions, on any device.

Queries are handled in chunks, whose logits fill a core's cache or a few large launches of a GPU.
Backward recomputes a chunk's probabilities, so nothing quadratic is ever stored.

T queries, n of a chunk; H heads; K their width; C entries; k selected entries of a query; c keys of
one part of a chunk (window tokens, or entries); W the window; r complex numbers of a
rotation, half of the rotary dims.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import host
from model.kernels.attention import host as fused
from model.kernels.attention.chunks import LOG2E, Chunk, chunks_of, max_pairs_of
from model.kernels.attention.inputs import AttentionInputs
from model.kernels.attention.ranges import AttentionRanges
from model.kernels.tensor_cores import tf32_matmuls


def eager_attention(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Computes `model.kernels.attention.attention_with_lse2`."""
    entries_CK, selected_Tk = inputs.entries_CK, inputs.selected_Tk
    if entries_CK is None or entries_CK.shape[0] == 0:
        entries_CK, selected_Tk = None, None
    with tf32_matmuls(inputs.q_THK):
        return _Attention.apply(
            inputs.q_THK.contiguous(),
            inputs.kv_LK,
            entries_CK,
            inputs.sink_H,
            inputs.rotation_Tr,
            inputs.ranges,
            selected_Tk,
            inputs.window,
            inputs.norm_eps,
        )


@torch.no_grad()
def eager_entry_probability_mass(
    inputs: AttentionInputs, lse2_TH: Tensor, *, start: int = 0, stop: int | None = None
) -> Tensor:
    """Computes `model.kernels.attention.entry_probability_mass`."""
    q_THK, entries_CK, ranges = inputs.q_THK, inputs.entries_CK, inputs.ranges
    rotation_Tr, selected_Tk = inputs.rotation_Tr, inputs.selected_Tk
    assert entries_CK is not None
    assert ranges.entry_start_T is not None and ranges.entry_end_T is not None
    stop = entries_CK.shape[0] if stop is None else stop
    tokens, heads, _ = q_THK.shape
    width = stop - start if selected_Tk is None else selected_Tk.shape[1]
    mass = torch.empty(tokens, width, dtype=torch.float32, device=q_THK.device)
    index = torch.arange(start, stop, device=q_THK.device)
    keys = entries_CK[start:stop].float()
    step = max(max_pairs_of(q_THK.device) // heads, 1)
    for first in range(0, tokens, step):
        rows = slice(first, first + step)
        scaled_q = _Queries(q_THK[rows], rotation_Tr[rows], inputs.norm_eps).scaled_q * LOG2E
        if selected_Tk is None:
            low, high = ranges.entry_start_T[rows, None], ranges.entry_end_T[rows, None]
            bias = _bias((index >= low) & (index < high))
            with tf32_matmuls(q_THK):
                logits = torch.mm(scaled_q.flatten(0, 1), keys.t()).view(*scaled_q.shape[:2], -1)
        else:
            part = _SelectedEntries(selected_Tk[rows], entries_CK)
            with tf32_matmuls(q_THK):
                bias, logits = part.bias, part.dot(scaled_q)
        logits = logits.add_(bias[:, None]).sub_(lse2_TH[rows, :, None])
        mass[rows] = logits.exp2_().sum(1)
    return mass


class _Queries:
    """A chunk's queries, normed, scaled and rotated, and the backward of that."""

    def __init__(self, q_nHK: Tensor, rotation_nr: Tensor, eps: float) -> None:
        self.raw = q_nHK.float()
        self.rotation = rotation_nr[:, None]
        self.scale = self.raw.shape[-1] ** -0.5
        square = torch.linalg.vector_norm(self.raw, dim=-1, keepdim=True).square_()
        self.rstd = square.div_(self.raw.shape[-1]).add_(eps).rsqrt_()
        self.scaled_q = rotate_(self.raw * (self.rstd * self.scale), self.rotation)

    def backward(self, grad_scaled_q: Tensor) -> Tensor:
        """Returns the raw queries' gradient given that of ``scaled_q``, which is overwritten."""
        # the component of the gradient along q, which the norm removes
        projection = torch.linalg.vecdot(grad_scaled_q, self.scaled_q)[..., None]
        projection = projection / self.raw.shape[-1]
        grad = rotate_(grad_scaled_q, self.rotation.conj())
        grad.mul_(self.rstd * self.scale)
        return grad.addcmul_(self.raw, self.rstd.square() * projection, value=-1)


def rotate_(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates in place the last dims of a contiguous fp32 ``x`` as adjacent pairs."""
    rotary = x[..., -2 * rotation.shape[-1] :].unflatten(-1, (-1, 2))
    torch.view_as_complex(rotary).mul_(rotation)
    return x


def _bias(visible: Tensor) -> Tensor:
    return torch.zeros_like(visible, dtype=torch.float32).masked_fill_(~visible, float("-inf"))


# The keys of a chunk are one or two parts, each with an attribute ``bias`` [n, c], 0 or -inf, and
# three methods: ``dot`` maps x [n, H, K] to x·kᵀ [n, H, c], ``weighted_sum`` maps p [n, H, c] to
# p·k [n, H, K], and ``accumulate`` adds Σ aᵀ·b over pairs of a [n, H, c] and b [n, H, K] to the
# keys' gradient.


class _WindowKeys:
    """The tokens of each band's window: overlapping slices of one array, never copied."""

    def __init__(self, chunk: Chunk, padded_kv: Tensor, window: int, start_T: Tensor) -> None:
        # Row r of the padded array is key r - (W - 1).
        self.chunk, self.bands = chunk, (chunk.stop - chunk.start) // chunk.band
        self.width = window - 1 + chunk.band
        self.keys = self._slices(padded_kv, 0, self.width)
        first = torch.arange(chunk.start, chunk.stop, chunk.band, device=padded_kv.device)
        first += chunk.shift
        key = first[:, None] + torch.arange(1 - window, chunk.band, device=first.device)
        own = first[:, None] + torch.arange(chunk.band, device=first.device)
        lowest = start_T[chunk.rows].view(self.bands, chunk.band, 1)
        visible = (key[:, None] >= lowest) & (key[:, None] <= own[..., None])
        self.bias = _bias(visible.flatten(0, 1))

    def _slices(self, padded: Tensor, offset: int, width: int) -> Tensor:
        dim, band = padded.shape[1], self.chunk.band
        start = (self.chunk.start + self.chunk.shift + offset) * dim
        return padded.as_strided((self.bands, width, dim), (band * dim, dim, 1), start)

    def _banded(self, x: Tensor) -> Tensor:
        return x.view(self.bands, -1, x.shape[-1])

    def dot(self, x_nHK: Tensor) -> Tensor:
        out = torch.bmm(self._banded(x_nHK), self.keys.transpose(1, 2))
        return out.view(*x_nHK.shape[:2], -1)

    def weighted_sum(self, p_nHc: Tensor) -> Tensor:
        return torch.bmm(self._banded(p_nHc), self.keys).view(*p_nHc.shape[:2], -1)

    def accumulate(self, padded_grad: Tensor, pairs: _Pairs) -> None:
        (a, b), (c, d) = [(self._banded(x).transpose(1, 2), self._banded(y)) for x, y in pairs]
        grad = torch.bmm(a, b).baddbmm_(c, d)
        # Slices of band length from different bands do not overlap: one in-place add per offset
        # is safe.
        for offset in range(0, self.width, self.chunk.band):
            part = grad[:, offset : offset + self.chunk.band]
            self._slices(padded_grad, offset, part.shape[1]).add_(part)


class _EntryRange:
    """Every entry between the first and the last that a query of the chunk sees."""

    def __init__(self, chunk: Chunk, entries: Tensor, ranges: AttentionRanges) -> None:
        assert ranges.entry_start_T is not None and ranges.entry_end_T is not None
        assert ranges.host_entry_start_T is not None and ranges.host_entry_end_T is not None
        rows = chunk.rows
        self.range = slice(
            int(ranges.host_entry_start_T[chunk.start]), int(ranges.host_entry_end_T[rows].max())
        )
        self.keys = entries[self.range].float()
        index = torch.arange(self.range.start, self.range.stop, device=entries.device)
        start, end = ranges.entry_start_T[rows, None], ranges.entry_end_T[rows, None]
        self.bias = _bias((index >= start) & (index < end))

    def dot(self, x_nHK: Tensor) -> Tensor:
        return torch.mm(x_nHK.flatten(0, 1), self.keys.t()).view(*x_nHK.shape[:2], -1)

    def weighted_sum(self, p_nHc: Tensor) -> Tensor:
        return torch.mm(p_nHc.flatten(0, 1), self.keys).view(*p_nHc.shape[:2], -1)

    def accumulate(self, grad_entries: Tensor, pairs: _Pairs) -> None:
        for a_nHc, b_nHK in pairs:
            grad_entries[self.range].addmm_(a_nHc.flatten(0, 1).t(), b_nHK.flatten(0, 1))


class _SelectedEntries:
    """Each query's selected entries, gathered."""

    def __init__(self, selected_nk: Tensor, entries: Tensor) -> None:
        self.index = selected_nk.clamp(min=0).flatten()
        self.keys = entries.index_select(0, self.index).float().view(*selected_nk.shape, -1)
        self.bias = _bias(selected_nk >= 0)

    def dot(self, x_nHK: Tensor) -> Tensor:
        return torch.bmm(x_nHK, self.keys.transpose(1, 2))

    def weighted_sum(self, p_nHc: Tensor) -> Tensor:
        return torch.bmm(p_nHc, self.keys)

    def accumulate(self, grad_entries: Tensor, pairs: _Pairs) -> None:
        (a, b), (c, d) = pairs
        grad = torch.bmm(a.transpose(1, 2), b).baddbmm_(c.transpose(1, 2), d)
        grad_entries.index_add_(0, self.index, grad.flatten(0, 1))


_Keys = _WindowKeys | _EntryRange | _SelectedEntries
_Pairs = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def _keys_of(
    chunk: Chunk,
    padded_kv: Tensor,
    entries: Tensor | None,
    selected: Tensor | None,
    ranges: AttentionRanges,
    window: int,
) -> list[_Keys]:
    parts: list[_Keys] = [_WindowKeys(chunk, padded_kv, window, ranges.window_start_T)]
    if entries is None:
        return parts
    assert ranges.host_entry_start_T is not None and ranges.host_entry_end_T is not None
    visible = ranges.host_entry_end_T[chunk.rows] - ranges.host_entry_start_T[chunk.rows]
    max_visible = int(visible.max())
    if selected is not None and max_visible > selected.shape[1]:
        parts.append(_SelectedEntries(selected[chunk.rows], entries))
    elif max_visible > 0:
        parts.append(_EntryRange(chunk, entries, ranges))
    return parts


def _logits(part: _Keys, scaled_q_nHK: Tensor) -> Tensor:
    """Returns base-2 logits, -inf where a query does not see the key."""
    return part.dot(scaled_q_nHK * LOG2E).add_(part.bias[:, None])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        entries: Tensor | None,
        sink: Tensor,
        rotation: Tensor,
        ranges: AttentionRanges,
        selected: Tensor | None,
        window: int,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.chunks = chunks_of(ranges.segments, q.shape[1], window, max_pairs_of(q.device))
        ctx.ranges, ctx.window, ctx.eps = ranges, window, eps
        if host.runs(q, kv, entries, sink):
            arguments = _fused_arguments(kv, entries, sink, rotation, selected, ctx)
            out_THK, lse2_TH = fused.forward(q, arguments, ctx.chunks)
            ctx.save_for_backward(q, kv, entries, sink, rotation, selected, out_THK, lse2_TH)
            ctx.mark_non_differentiable(lse2_TH)
            return out_THK, lse2_TH
        padded_kv = F.pad(kv.float(), (0, 0, window - 1, 0))
        out_THK = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse2_TH = q.new_empty(q.shape[:2], dtype=torch.float32)
        sink_H = sink.float() * LOG2E
        for chunk in ctx.chunks:
            queries = _Queries(q[chunk.rows], rotation[chunk.rows], eps)
            parts = _keys_of(chunk, padded_kv, entries, selected, ranges, window)
            logits = [_logits(part, queries.scaled_q) for part in parts]
            top_nH = sink_H
            for x_nHc in logits:
                top_nH = torch.maximum(top_nH, x_nHc.amax(-1))
            total_nH = torch.exp2(sink_H - top_nH)
            out = torch.zeros_like(queries.scaled_q)
            for part, x_nHc in zip(parts, logits, strict=True):
                p_nHc = x_nHc.sub_(top_nH[..., None]).exp2_()
                total_nH += p_nHc.sum(-1)
                out += part.weighted_sum(p_nHc)
            out_THK[chunk.rows] = rotate_(out.div_(total_nH[..., None]), queries.rotation.conj())
            lse2_TH[chunk.rows] = top_nH + total_nH.log2()
        ctx.save_for_backward(q, kv, entries, sink, rotation, selected, out_THK, lse2_TH)
        ctx.mark_non_differentiable(lse2_TH)
        return out_THK, lse2_TH

    @staticmethod
    def backward(ctx: Any, grad_out_THK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        with tf32_matmuls(grad_out_THK):
            return _Attention._gradients(ctx, grad_out_THK)

    @staticmethod
    def _gradients(ctx: Any, grad_out_THK: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, entries, sink, rotation, selected, out_THK, lse2_TH = ctx.saved_tensors
        if host.runs(q, kv, entries, sink):
            arguments = _fused_arguments(kv, entries, sink, rotation, selected, ctx)
            results = out_THK, lse2_TH, grad_out_THK.contiguous()
            return *fused.backward(q, arguments, ctx.chunks, *results), *[None] * 5
        padded_kv = F.pad(kv.float(), (0, 0, ctx.window - 1, 0))
        grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_kv = torch.zeros_like(padded_kv)
        grad_entries = None if entries is None else torch.zeros_like(entries, dtype=torch.float32)
        delta_TH = torch.linalg.vecdot(grad_out_THK.float(), out_THK.float())
        for chunk in ctx.chunks:
            rows = chunk.rows
            queries = _Queries(q[rows], rotation[rows], ctx.eps)
            grad_nHK = grad_out_THK[rows].to(torch.float32, copy=True).contiguous()
            rotate_(grad_nHK, queries.rotation)
            grad_scaled_q = torch.zeros_like(queries.scaled_q)
            for part in _keys_of(chunk, padded_kv, entries, selected, ctx.ranges, ctx.window):
                p_nHc = _logits(part, queries.scaled_q).sub_(lse2_TH[rows, :, None]).exp2_()
                ds_nHc = part.dot(grad_nHK).sub_(delta_TH[rows, :, None]).mul_(p_nHc)
                target = grad_kv if isinstance(part, _WindowKeys) else grad_entries
                assert target is not None
                part.accumulate(target, ((ds_nHc, queries.scaled_q), (p_nHc, grad_nHK)))
                grad_scaled_q += part.weighted_sum(ds_nHc)
            grad_q[rows] = queries.backward(grad_scaled_q)
        sink_probability_TH = torch.exp2(sink.float() * LOG2E - lse2_TH)
        grad_sink = -(sink_probability_TH * delta_TH).sum(0).to(sink.dtype)
        grad_kv = grad_kv[ctx.window - 1 :].to(kv.dtype)
        if grad_entries is not None:
            grad_entries = grad_entries.to(entries.dtype)
        return grad_q, grad_kv, grad_entries, grad_sink, *[None] * 5


def _fused_arguments(
    kv: Tensor,
    entries: Tensor | None,
    sink: Tensor,
    rotation: Tensor,
    selected: Tensor | None,
    ctx: Any,
) -> fused.Arguments:
    angles = torch.view_as_real(rotation.resolve_conj()).flatten(1)
    return fused.Arguments(kv, entries, sink, angles, ctx.ranges, selected, ctx.window, ctx.eps)
