"""Lightning indexer: the selection of compressed entries (report §2.3.1; objective: V3.2).

T queries; I index heads; J their width; C compressed entries; k selected entries of a query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.attention import AttentionRanges
from model.kernels.indexer.inputs import IndexerInputs
from model.kernels.indexer.kl_target import (
    KLTarget,
    MassFunction,
    attention_probability_mass,
    selected_probability_mass,
)
from model.kernels.indexer.objective import indexer_objective
from model.kernels.indexer.select_eager import eager_select_topk
from model.kernels.operations import EAGER, Choice

__all__ = [
    "IndexerInputs",
    "KLTarget",
    "MassFunction",
    "attention_probability_mass",
    "indexer_objective",
    "select_topk",
    "selected_probability_mass",
]


@torch.no_grad()
def select_topk(
    inputs: IndexerInputs, ranges: AttentionRanges, k: int, choice: Choice = EAGER
) -> Tensor:
    """Selects the k visible entries of each query with the largest Σ_h w_h · ReLU(q_h · k_s).

    Ties are broken in favour of the lower index, so the selection does not depend on layout or
    device. Only the entry ranges of ``ranges`` are used.

    Returns:
        int32 [T, k]: entry indices, then -1 where a query sees fewer than k.
    """
    if choice.name == "triton":
        from model.kernels.indexer import select_triton

        return select_triton.select_topk(inputs, ranges, k, **choice.blocks)
    return eager_select_topk(inputs, ranges, k)
