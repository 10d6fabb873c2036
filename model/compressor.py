"""Compressors: windows of tokens pooled into one key-value entry each (report §2.3.1, §2.3.2).

Letters: T tokens, D hidden size, C entries, K width of an entry (head_dim, or index_head_dim in the
indexer), r = R/2 complex numbers that rotate R dims.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.exchange import EntryKind, Exchange, layer_type_of
from model.kernels.compressor import pool_windows
from model.kernels.operations import ALL_EAGER, Kernels
from model.linear import FP32OutLinear
from model.norm import RMSNorm
from model.positions import Positions


class Compressor(nn.Module):
    """Makes entries of width ``dim``; windows overlap in a CSA layer, not in an HCA layer.

    Projections, pooling and norm are in fp32, as in the official code; entries are rounded once.
    """

    def __init__(
        self,
        config: ModelConfig,
        entries: EntryKind,
        dim: int,
        dtype: torch.dtype,
        kernels: Kernels = ALL_EAGER,
    ) -> None:
        super().__init__()
        kind = layer_type_of(entries)
        self.entries, self.kind = entries, kind
        self.overlap = kind == "csa"
        width = 2 * dim if self.overlap else dim
        self.wkv = FP32OutLinear(config.hidden_size, width, dtype)
        self.wgate = FP32OutLinear(config.hidden_size, width, dtype)
        ratio = config.compress_ratio(kind)
        self.ape = nn.Parameter(torch.empty(ratio, width, dtype=torch.float32))
        self.choice = kernels.compressor
        self.norm = RMSNorm(dim, config.rms_norm_eps, kernels)

    def forward(
        self,
        x_TD: Tensor,
        positions: Positions,
        exchange: Exchange,
        rounded: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Returns an entry [C, K] for every complete window, normed and rotated, in x's dtype.

        ``rounded`` is applied to this rank's entries before they are gathered.
        """
        windows = positions.windows(self.kind)
        values, gates = exchange.prepend_halo(self.entries, self.wkv(x_TD), self.wgate(x_TD))
        pooled_CK = pool_windows(
            values,
            gates,
            self.ape,
            windows.first_token_C,
            windows.has_previous_C,
            self.overlap,
            self.choice,
        )
        entries_CK = self.norm(pooled_CK, windows.rotation_Cr, x_TD.dtype)
        if rounded is not None:
            entries_CK = rounded(entries_CK)
        return exchange.gather_entries(self.entries, entries_CK)
