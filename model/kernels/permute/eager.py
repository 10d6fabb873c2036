"""The sum of each token's expert rows with torch's functions, on any device.

T tokens; A experts of a token; L = T·A; P places; D the hidden width.
"""

from __future__ import annotations

from torch import Tensor


def eager_unpermute(y_PD: Tensor, place_L: Tensor, tokens: int) -> Tensor:
    """Sums the rows at each token's A places, [T, D]."""
    return y_PD.index_select(0, place_L).unflatten(0, (tokens, -1)).sum(1)
