"""Pooling of token windows with torch's functions, on any device.

T tokens; C entries; m tokens of a window; K an entry's width; X = K, or 2K where windows overlap.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_pool_windows(
    values_TX: Tensor,
    gates_TX: Tensor,
    ape_mX: Tensor,
    first_token_C: Tensor,
    has_previous_C: Tensor,
    overlap: bool,
) -> Tensor:
    """Computes `model.kernels.compressor.pool_windows` in fp32."""
    m = ape_mX.shape[0]
    token_index = (first_token_C[:, None] + torch.arange(m, device=first_token_C.device)).flatten()
    values_CmX = values_TX.index_select(0, token_index).float().unflatten(0, (-1, m))
    gates_CmX = gates_TX.index_select(0, token_index).float().unflatten(0, (-1, m)) + ape_mX.float()
    if overlap:
        values_CmX = _with_previous(values_CmX)
        gates_CmX = _with_previous(gates_CmX)
        no_previous = F.pad(~has_previous_C[:, None].expand(-1, m), (0, m))
        gates_CmX = gates_CmX.masked_fill(no_previous[..., None], float("-inf"))
    return (gates_CmX.softmax(dim=1) * values_CmX).sum(dim=1)


def _with_previous(x_CmX: Tensor) -> Tensor:
    """Joins the previous window's first half and this one's second: [C, m, 2K] to [C, 2m, K]."""
    previous, own = x_CmX.chunk(2, dim=-1)
    previous = F.pad(previous, (0, 0, 0, 0, 1, 0))[:-1]
    return torch.cat([previous, own], dim=1)
