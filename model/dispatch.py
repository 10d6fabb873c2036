"""Dispatches tokens to their experts and combines the results.

Letters: T tokens, A experts of a token, L = T·A pairs of a token and one of its experts, P padded
rows, D hidden size, E experts on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.kernels.grouped_mm import row_alignment
from model.kernels.operations import EAGER, Choice
from model.kernels.permute import permute_rows, sort_pairs, unpermute_rows
from model.router import Routing


@dataclass(frozen=True)
class Dispatched:
    """Rows sorted by expert for grouped matmuls, and the indices that map them back to tokens.

    Padding rows have weight 0: they change no output and no gradient of a parameter or token
    (though the experts' outputs there do get a gradient, see `unpermute_rows`). Rows after the last
    expert's end are not computed at all.

    Attributes:
        rows_PD: hidden states, sorted by expert.
        weights_P: routing weight of each row.
        ends_E: int32, where each expert's rows end.
        token_of_row_P: index of the token in each row; 0 in padding rows.
        row_of_pair_L: index of each pair's row.
    """

    rows_PD: Tensor
    weights_P: Tensor
    ends_E: Tensor
    token_of_row_P: Tensor
    row_of_pair_L: Tensor


PendingRows = Callable[[], Dispatched]
"""A dispatch that has begun: call it once, on every rank, for its rows."""


@dataclass(frozen=True)
class LocalDispatch:
    """Sorts rows by expert; all experts are on this rank.

    Attributes:
        choice: the implementation of the combine.
    """

    choice: Choice = EAGER

    def begin(self, x_TD: Tensor, routing: Routing, num_experts: int) -> PendingRows:
        """Does all of `dispatch`: nothing has to be waited for."""
        dispatched = self.dispatch(x_TD, routing, num_experts)
        return lambda: dispatched

    def dispatch(self, x_TD: Tensor, routing: Routing, num_experts: int) -> Dispatched:
        """Copies each token's hidden state once per selected expert, sorted by expert.

        There is no host-device sync: on an accelerator P is an upper bound from shapes alone.
        """
        expert_L = routing.indices_TA.flatten()
        # Padded, so that a token's output does not depend on which experts other tokens chose.
        alignment = row_alignment(x_TD)
        pair_of_row_P, row_of_pair_L, ends_E = sort_pairs(expert_L, num_experts, alignment)
        weights_L = routing.weights_TA.flatten()
        weights_P = weights_L.new_zeros(len(pair_of_row_P)).index_copy(0, row_of_pair_L, weights_L)
        token_of_row_P = pair_of_row_P // routing.indices_TA.shape[1]
        rows_PD = permute_rows(x_TD, token_of_row_P, row_of_pair_L, self.choice)
        return Dispatched(rows_PD, weights_P, ends_E, token_of_row_P, row_of_pair_L)

    def combine(self, y_PD: Tensor, dispatched: Dispatched, num_tokens: int) -> Tensor:
        """Sums each token's expert outputs to [T, D]."""
        return unpermute_rows(
            y_PD,
            dispatched.token_of_row_P,
            dispatched.row_of_pair_L,
            num_tokens,
            self.choice,
        )


def count_each(index_L: Tensor, size: int) -> Tensor:
    """Counts each index below ``size``, int64; unlike bincount, this needs no device sync."""
    return index_L.new_zeros(size).index_add_(0, index_L, torch.ones_like(index_L))


class Dispatch(Protocol):
    """Sends tokens to their experts and combines the results; see LocalDispatch."""

    def begin(self, x_TD: Tensor, routing: Routing, num_experts: int) -> PendingRows:
        """Begins to send tokens; the result returns the rows of this rank's experts, by expert.

        The host may wait in that call: a device needs work from between the two calls.
        """

    def combine(self, y_PD: Tensor, dispatched: Dispatched, num_tokens: int) -> Tensor:
        """Sums each token's expert outputs to [T, D]."""
