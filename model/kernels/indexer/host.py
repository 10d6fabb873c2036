"""Scores and the selection of entries as fused loops for a CPU, in fp32.

n queries of a block; I index heads; c entries of a block; k selected entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.kernels import host
from model.kernels.host import Array, fused_loop

_F32 = np.float32


def select(
    dots_nIc: Tensor, weights_nI: Tensor, first: int, low_n: Any, high_n: Any, selected_nk: Tensor
) -> None:
    """Writes the indices of each query's k best entries, the best first, then -1.

    Args:
        dots_nIc: q · k of the entries from ``first`` on.
        low_n, high_n: NumPy arrays, the range of entries that each query sees.
    """
    low, high = torch.from_numpy(low_n), torch.from_numpy(high_n)
    host.over_rows(_select_rows, dots_nIc, weights_nI, first, low, high, selected_nk)


@fused_loop
def _select_rows(
    start: int,
    stop: int,
    dots: Array,
    weights: Array,
    first: int,
    low: Any,
    high: Any,
    selected: Any,
) -> None:
    heads, k = dots.shape[1], selected.shape[1]
    scores = np.empty(dots.shape[2], _F32)
    best, index = np.empty(k, _F32), np.empty(k, np.int64)
    for n in range(start, stop):
        begin, end = low[n] - first, high[n] - first
        for c in range(begin, end):
            scores[c] = 0
        for i in range(heads):
            x, weight = dots[n, i], weights[n, i]
            for c in range(begin, end):
                scores[c] += weight * (_F32(0) if x[c] < 0 else x[c])
        # A heap of the best so far, the worst of them first.
        size = min(k, end - begin)
        for place in range(size):
            best[place], index[place] = scores[begin + place], begin + place
        for place in range(size // 2 - 1, -1, -1):
            _sift_down(best, index, place, size)
        for c in range(begin + size, end):
            if scores[c] > best[0]:  # of equal scores the lower index stays
                best[0], index[0] = scores[c], c
                _sift_down(best, index, 0, size)
        for place in range(size - 1, -1, -1):
            selected[n, place] = first + index[0]
            best[0], index[0] = best[place], index[place]
            _sift_down(best, index, 0, place)
        for place in range(size, k):
            selected[n, place] = -1


@fused_loop
def _sift_down(best: Array, index: Any, place: int, size: int) -> None:
    """Moves an item of the heap down until no child of it is worse."""
    x, at = best[place], index[place]
    while 2 * place + 1 < size:
        child = 2 * place + 1
        if child + 1 < size:
            a, b = best[child], best[child + 1]
            if b < a or (b == a and index[child + 1] > index[child]):
                child += 1
        if not (best[child] < x or (best[child] == x and index[child] > at)):
            break
        best[place], index[place] = best[child], index[child]
        place = child
    best[place], index[place] = x, at
