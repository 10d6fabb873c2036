"""Dispatches tokens to their experts and combines the results.

Letters: T tokens, A experts of a token, L = T·A pairs of a token and an expert, P padded rows,
D hidden size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.kernels.permute import permute_rows, unpermute_rows
from model.router import Routing

ROW_ALIGNMENT = 16
"""Every expert's rows are padded to a multiple of this. Grouped matmuls want aligned groups, and
matmuls of a handful of rows take other code paths, which round differently: with padding, a token's
output does not depend on which experts other tokens chose."""


@dataclass(frozen=True)
class Dispatched:
    """Rows sorted by expert for grouped matmuls, and the indices that map them back to tokens.

    Padding rows have weight 0, and so no effect and no gradient; rows after the last expert's end
    are not computed at all.
    """

    rows_PD: Tensor
    weights_P: Tensor
    ends_E: Tensor
    order_P: Tensor
    place_L: Tensor


class LocalDispatch:
    """Sorts rows by expert; all experts are on this rank."""

    def dispatch(self, x_TD: Tensor, routing: Routing, experts: int) -> Dispatched:
        """Copies each token's row to each of its experts, in the order of experts.

        P follows from the shapes alone, so that the host does not wait for the device.
        """
        expert_L = routing.indices_TA.flatten()
        pairs = len(expert_L)
        count_E = count_each(expert_L, experts)
        padded_E = (count_E + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT
        ends_E = padded_E.cumsum(0)
        shift_E = (ends_E - padded_E) - (count_E.cumsum(0) - count_E)
        sorted_L = torch.argsort(expert_L, stable=True)
        place = torch.arange(pairs, device=expert_L.device) + shift_E[expert_L[sorted_L]]
        places = pairs + min(experts, pairs) * (ROW_ALIGNMENT - 1)
        order_P = sorted_L.new_zeros(places).index_copy_(0, place, sorted_L)
        place_L = torch.empty_like(sorted_L).index_copy_(0, sorted_L, place)
        weights_L = routing.weights_TA.flatten()
        weights_P = weights_L.new_zeros(places).index_copy(0, place_L, weights_L)
        rows_PD = permute_rows(x_TD, order_P, place_L)
        return Dispatched(rows_PD, weights_P, ends_E.to(torch.int32), order_P, place_L)

    def combine(self, y_PD: Tensor, sent: Dispatched, tokens: int) -> Tensor:
        """Sums each token's expert outputs to [T, D]."""
        return unpermute_rows(y_PD, sent.order_P, sent.place_L, tokens)


def count_each(index_L: Tensor, size: int) -> Tensor:
    """Counts of each index below ``size``, int64; unlike bincount without a device sync."""
    return index_L.new_zeros(size).index_add_(0, index_L, torch.ones_like(index_L))


class Dispatch(Protocol):
    """Sends tokens to their experts and combines the results; see LocalDispatch."""

    def dispatch(self, x_TD: Tensor, routing: Routing, experts: int) -> Dispatched:
        """Returns the rows of this rank's experts, sorted by expert."""

    def combine(self, y_PD: Tensor, sent: Dispatched, tokens: int) -> Tensor:
        """Sums each token's expert outputs to [T, D]."""
