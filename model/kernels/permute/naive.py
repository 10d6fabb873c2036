"""MoE permute and unpermute, one row at a time, for comparison in any dtype.

T tokens; A experts of a token; L = T·A (token, choice) pairs; P rows; D the hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_permute_rows(x_TD: Tensor, token_of_row_P: Tensor, row_of_pair_L: Tensor) -> Tensor:
    """Copies to each row that of its token, [P, D].

    Padding rows hold copies as well, but propagate no gradient.
    """
    copies_PD = torch.stack([x_TD[token] for token in token_of_row_P.tolist()])
    used_P1 = torch.zeros(len(token_of_row_P), 1, dtype=x_TD.dtype, device=x_TD.device)
    used_P1[row_of_pair_L] = 1
    return copies_PD * used_P1 + (copies_PD * (1 - used_P1)).detach()


def naive_unpermute_rows(y_PD: Tensor, row_of_pair_L: Tensor, tokens: int) -> Tensor:
    """Sums each token's A rows, [T, D]."""
    return torch.stack([y_PD[rows].sum(0) for rows in row_of_pair_L.view(tokens, -1)])
