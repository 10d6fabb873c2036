"""The sum of each token's expert rows with torch's functions, on any device.

T tokens; A experts of a token; L = T·A pairs; P rows; D the hidden width.
"""

from __future__ import annotations

from torch import Tensor


def eager_unpermute(y_PD: Tensor, row_of_pair_L: Tensor, tokens: int) -> Tensor:
    """Sums each token's A rows, [T, D]."""
    return y_PD.index_select(0, row_of_pair_L).unflatten(0, (tokens, -1)).sum(1)
