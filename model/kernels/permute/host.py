"""Pairs sorted by expert, and sums of each token's rows, as fused loops for a CPU.

T tokens; A experts of a token; L = T·A (token, choice) pairs; P rows, padding included; E experts;
D the hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.kernels import host
from model.kernels.host import Array, fused_loop


def sort_pairs(expert_L: Tensor, num_experts: int, alignment: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts pairs by expert, in their order, and pads each expert's to a multiple of ``alignment``.

    Returns:
        int64 [P], the pair in each row, 0 in padding rows; int64 [L], the row of each pair; and
        int32 [E], where each expert's rows end: the last is P.

    Raises:
        IndexError: an expert is not below ``num_experts``.
    """
    pairs = len(expert_L)
    row_of_pair_L = torch.empty_like(expert_L)
    pair_of_row = expert_L.new_empty(pairs + min(num_experts, pairs) * (alignment - 1))
    ends_E = torch.empty(num_experts, dtype=torch.int32)
    arrays = [host.array(x) for x in (expert_L, pair_of_row, row_of_pair_L, ends_E)]
    _sort_pairs(alignment, *arrays)
    rows = int(arrays[-1][-1])
    if rows < 0:
        raise IndexError(f"experts should be from 0 to {num_experts - 1}")
    return pair_of_row[:rows], row_of_pair_L, ends_E


def sum_rows(y_PD: Tensor, row_of_pair_L: Tensor, tokens: int) -> Tensor:
    """Computes `model.kernels.permute.eager.eager_unpermute`."""
    out_TD = y_PD.new_empty(tokens, y_PD.shape[1])
    rows_TA = row_of_pair_L.view(tokens, -1)
    host.over_rows(_sum_rows, out_TD, y_PD, rows_TA, numbers=rows_TA.shape[1] * out_TD.numel())
    return out_TD


@fused_loop
def _sort_pairs(alignment: int, expert: Any, pair_of_row: Any, row_of_pair: Any, ends: Any) -> None:
    for e in range(len(ends)):
        ends[e] = 0
    for pair in range(len(expert)):
        if expert[pair] < 0 or expert[pair] >= len(ends):
            ends[-1] = -1
            return
        ends[expert[pair]] += 1
    end = 0
    for e in range(len(ends)):
        count = ends[e]
        ends[e] = end  # for now its first row
        end += (count + alignment - 1) // alignment * alignment
    for row in range(end):
        pair_of_row[row] = 0
    for pair in range(len(expert)):
        row = ends[expert[pair]]
        pair_of_row[row] = pair
        row_of_pair[pair] = row
        ends[expert[pair]] += 1
    for e in range(len(ends)):
        ends[e] = (ends[e] + alignment - 1) // alignment * alignment


@fused_loop
def _sum_rows(start: int, stop: int, out: Array, y: Array, rows: Any) -> None:
    for t in range(start, stop):
        o, x = out[t], y[rows[t, 0]]
        for d in range(len(o)):
            o[d] = x[d]
        for a in range(1, rows.shape[1]):
            x = y[rows[t, a]]
            for d in range(len(o)):
                o[d] += x[d]
