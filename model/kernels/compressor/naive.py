"""Pooling of token windows, one entry at a time (report §2.3.1, §2.3.2), in any dtype.

T tokens; C entries; m tokens of a window; K an entry's width; X = K, or 2K where windows overlap.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_pool_windows(
    values_TX: Tensor,
    gates_TX: Tensor,
    ape_mX: Tensor,
    first_token_C: Tensor,
    has_previous_C: Tensor,
    overlap: bool,
) -> Tensor:
    """Computes each entry as a mean over its 2m or m tokens, by a softmax per channel, [C, K]."""
    m, width = ape_mX.shape
    dim = width // 2 if overlap else width
    entries = [values_TX[:0, :dim]]  # an empty result where there is no entry
    for first, has_previous in zip(first_token_C.tolist(), has_previous_C.tolist(), strict=True):
        window = slice(first, first + m)
        value, gate = values_TX[window, -dim:], gates_TX[window, -dim:] + ape_mX[:, -dim:]
        if overlap and has_previous:
            previous = slice(first - m, first)
            value = torch.cat([values_TX[previous, :dim], value])
            gate = torch.cat([gates_TX[previous, :dim] + ape_mX[:, :dim], gate])
        weight = gate.exp() / gate.exp().sum(0)
        entries.append((weight * value).sum(0, keepdim=True))
    return torch.cat(entries)
