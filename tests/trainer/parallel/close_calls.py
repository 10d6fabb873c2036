"""How close a run comes to choosing otherwise: rounding must not decide which rows are compared.

Which experts a token goes to and which entries an index keeps are choices by order of scores. Two
topologies round differently, so where two scores nearly tie they may choose differently, and from
then on train differently, both rightly. Parity is therefore tested on a run without close calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from model import indexer as indexer_module
from model.kernels.attention import AttentionRanges
from model.kernels.indexer import IndexerInputs, select_topk
from model.router import Router, Routing


class Gaps:
    """The smallest gap seen between the last score taken and the first that is not.

    Relative to the size of the scores: for an index, of the largest term of a query's sums.
    """

    def __init__(self) -> None:
        self.router = self.index = float("inf")


@contextmanager
def recorded_gaps() -> Iterator[Gaps]:
    """Records the gaps of all routers and indexers that run inside."""
    gaps = Gaps()
    route = Router.forward

    def router(
        self: Router, x_TD: Tensor, tokens_T: Tensor, expert_indices_TA: Tensor | None = None
    ) -> Routing:
        routing = route(self, x_TD, tokens_T, expert_indices_TA)
        if not self.hashed:
            scores = (routing.scores_TE.detach() + self.bias).sort(descending=True).values
            gap = (scores[:, self.top_k - 1] - scores[:, self.top_k]) / scores[:, 0]
            gaps.router = min(gaps.router, float(gap.min()))
        return routing

    def index(inputs: IndexerInputs, ranges: AttentionRanges, k: int, *more: Any) -> Tensor:
        gaps.index = min(gaps.index, index_gap(inputs, ranges, k))
        return select_topk(inputs, ranges, k, *more)

    with (
        patch.object(Router, "forward", router),
        patch.object(indexer_module, "select_topk", index),
    ):
        yield gaps


@torch.no_grad()
def index_gap(inputs: IndexerInputs, ranges: AttentionRanges, k: int) -> float:
    """The smallest gap of any query that has a choice.

    Terms of ReLU that are cut off are exactly 0 at every topology, unless the product is so near 0
    that rounding decides; their distance from 0 is a gap like the others.
    """
    q_TIJ, keys_CJ, weights_TI = inputs.q_TIJ, inputs.keys_CJ, inputs.weights_TI
    dots_TIC = torch.einsum("tij,cj->tic", q_TIJ.float(), keys_CJ.float())
    scores_TC = (weights_TI[..., None] * dots_TIC.relu()).sum(1)
    assert ranges.entry_start_T is not None and ranges.entry_end_T is not None
    entry = torch.arange(len(keys_CJ))
    sees = (entry >= ranges.entry_start_T[:, None]) & (entry < ranges.entry_end_T[:, None])
    choosing = sees.sum(1) > k
    if not choosing.any():
        return float("inf")
    size_T = (weights_TI[..., None] * dots_TIC).abs().amax((1, 2))
    ordered = scores_TC.masked_fill(~sees, float("-inf")).sort(descending=True).values
    gap_T = ordered[:, k - 1] - ordered[:, k]
    # Equal scores are sums without any term: the lower entry is taken everywhere.
    gap_T = gap_T.masked_fill(gap_T == 0, float("inf")) / size_T
    return float(gap_T[choosing].min())
