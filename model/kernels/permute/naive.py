"""Rows to their experts and back, one row at a time, for comparison in any dtype.

T tokens; A experts of a token; L = T·A (token, choice) pairs; P places; D the hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_permute_rows(x_TD: Tensor, order_P: Tensor, place_L: Tensor) -> Tensor:
    """Copies to each place the row of its pair's token, [P, D].

    Places that belong to no pair hold copies as well, but send no gradient back.
    """
    choices = len(place_L) // len(x_TD)
    copies_PD = torch.stack([x_TD[pair // choices] for pair in order_P.tolist()])
    used_P1 = torch.zeros(len(order_P), 1, dtype=x_TD.dtype, device=x_TD.device)
    used_P1[place_L] = 1
    return copies_PD * used_P1 + (copies_PD * (1 - used_P1)).detach()


def naive_unpermute_rows(y_PD: Tensor, place_L: Tensor, tokens: int) -> Tensor:
    """Sums the rows at each token's A places, [T, D]."""
    return torch.stack([y_PD[places].sum(0) for places in place_L.view(tokens, -1)])
