"""Scores and the selection of entries: fused loops on a CPU, torch's functions elsewhere.

T queries, n of a block; I index heads; J their width; C entries, c of a block; k selected entries.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from model.kernels import host
from model.kernels.attention import AttentionRanges
from model.kernels.indexer import host as fused
from model.kernels.indexer.inputs import IndexerInputs
from model.kernels.tensor_cores import tf32_matmuls

_CPU_SCORES, _GPU_SCORES = 1 << 19, 1 << 27
"""Max per-head scores held at once: fits a core's cache (CPU), or 0.5 GiB (GPU)."""
_GPU_JOINED = 1 << 23
"""Max scores of a block with other entries between those of its rows: computing them takes a GPU no
longer than starting another block."""


@torch.no_grad()
def eager_select_topk(inputs: IndexerInputs, ranges: AttentionRanges, k: int) -> Tensor:
    """Computes `model.kernels.indexer.select_topk`."""
    assert ranges.entry_start_T is not None and ranges.entry_end_T is not None
    assert ranges.host_entry_start_T is not None and ranges.host_entry_end_T is not None
    q_TIJ, keys_CJ, weights_TI = inputs.q_TIJ, inputs.keys_CJ, inputs.weights_TI
    start_T, end_T = ranges.entry_start_T, ranges.entry_end_T
    all_Tk = start_T[:, None] + torch.arange(k, device=start_T.device)
    selected_Tk = torch.where(all_Tk < end_T[:, None], all_Tk, -1).to(torch.int32)
    heads = q_TIJ.shape[1]
    host_start, host_end = ranges.host_entry_start_T, ranges.host_entry_end_T
    for rows in _blocks(host_start, host_end, heads, q_TIJ.device):
        # Where no query sees more than k entries there is nothing to select.
        if (host_end[rows] - host_start[rows]).max() <= k:
            continue
        first, last = int(host_start[rows][0]), int(host_end[rows].max())
        dots = _dots(q_TIJ[rows], keys_CJ[first:last])
        if host.runs(dots) and host.runs(selected_Tk, dtype=torch.int32):
            bounds = host_start[rows], host_end[rows]
            fused.select(dots, weights_TI[rows].float(), first, *bounds, selected_Tk[rows])
            continue
        scores = _scores(dots, weights_TI[rows])
        index = torch.arange(first, last, device=scores.device)
        masked = (index < start_T[rows, None]) | (index >= end_T[rows, None])
        scores.masked_fill_(masked, float("-inf"))
        best = _ordered(scores).topk(k, dim=-1).indices
        best = best.masked_fill(masked.gather(1, best), -1 - first) + first
        selected_Tk[rows] = best.to(torch.int32)
    return selected_Tk


def _blocks(
    start_T: np.ndarray, end_T: np.ndarray, heads: int, device: torch.device
) -> Iterator[slice]:
    """Yields blocks of rows, whose scores of all entries from the first to the last are computed.

    A block ends where others' entries, or a cache's empty rows, follow those of its rows.
    """
    on_cpu = device.type == "cpu"
    max_scores, max_joined = (_CPU_SCORES, 0) if on_cpu else (_GPU_SCORES, _GPU_JOINED)
    gaps = np.flatnonzero(start_T[1:] > end_T[:-1]) + 1
    stops = [*gaps.tolist(), len(start_T)]
    first = 0
    for stop, next_stop in zip(stops, [*stops[1:], None], strict=True):
        if next_stop is not None:
            span = int(end_T[first:next_stop].max() - start_T[first])
            if heads * (next_stop - first) * span <= max_joined:
                continue
        widest = int((end_T - start_T)[first:stop].max(initial=0))
        step = max(max_scores // (heads * max(widest, 1)), 1)
        for row in range(first, stop, step):
            yield slice(row, min(row + step, stop))
        first = stop


def entry_scores(q_nIJ: Tensor, keys_cJ: Tensor, weights_nI: Tensor) -> Tensor:
    """Computes Σ_h w_h · ReLU(q_h · k_s) of every pair, fp32 [n, c]."""
    return _scores(_dots(q_nIJ, keys_cJ), weights_nI)


def _dots(q_nIJ: Tensor, keys_cJ: Tensor) -> Tensor:
    n, heads, dim = q_nIJ.shape
    with tf32_matmuls(q_nIJ):  # exact: the factors are in bf16
        dots = torch.mm(q_nIJ.reshape(n * heads, dim).float(), keys_cJ.float().t())
    return dots.view(n, heads, -1)


def _scores(dots_nIc: Tensor, weights_nI: Tensor) -> Tensor:
    return torch.bmm(weights_nI.float()[:, None], dots_nIc.relu_())[:, 0]


def _ordered(scores_nc: Tensor) -> Tensor:
    """Returns distinct int64 keys in the order of (score, lower index first).

    The bits of a float sort like the number itself once negative ones are flipped; adding zero
    makes -0.0 and 0.0 equal.
    """
    bits = (scores_nc + 0.0).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    width = scores_nc.shape[-1]
    lower_first = torch.arange(width - 1, -1, -1, device=scores_nc.device)
    return (bits.long() << 32) | lower_first
