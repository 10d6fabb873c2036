"""Pairs sorted by expert, and sums of each token's rows: fused loops on a CPU, torch elsewhere.

T tokens; A experts of a token; L = T·A (token, choice) pairs; P rows, padding included; E experts;
D the hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels import host
from model.kernels.permute import host as fused


def sort_pairs(expert_L: Tensor, num_experts: int, alignment: int) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `model.kernels.permute.sort_pairs`."""
    if host.runs(expert_L, dtype=torch.int64):
        return fused.sort_pairs(expert_L, num_experts, alignment)
    num_pairs = len(expert_L)
    sorted_expert_L, sorted_L = expert_L.sort(stable=True)
    index = torch.arange(max(num_pairs, num_experts + 1), device=expert_L.device)
    bounds = torch.searchsorted(sorted_expert_L, index[: num_experts + 1], out_int32=True)
    start_E, end_E = bounds[:-1], bounds[1:]  # of each expert's pairs
    padding_E = (start_E - end_E) % alignment
    shift_E = padding_E.cumsum(0, dtype=torch.int32)  # of the rows after an expert's
    row_L = index[:num_pairs] + (shift_E - padding_E)[sorted_expert_L]
    padded_rows = num_pairs + min(num_experts, num_pairs) * (alignment - 1)
    pair_of_row_P = sorted_L.new_zeros(padded_rows).index_copy_(0, row_L, sorted_L)
    row_of_pair_L = torch.empty_like(sorted_L).index_copy_(0, sorted_L, row_L)
    return pair_of_row_P, row_of_pair_L, end_E + shift_E


def eager_unpermute(y_PD: Tensor, row_of_pair_L: Tensor, tokens: int) -> Tensor:
    """Sums each token's A rows, [T, D]."""
    if tokens and host.runs(y_PD):
        return fused.sum_rows(y_PD, row_of_pair_L, tokens)
    return y_PD.index_select(0, row_of_pair_L).unflatten(0, (tokens, -1)).sum(1)
