"""Lightning indexer of a CSA layer: which compressed entries a query attends to (report 2.3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.compressor import Compressor
from model.config import ModelConfig
from model.kernels.indexer import select_topk
from model.positions import Positions
from model.rope import rotate


class Indexer(nn.Module):
    """Scores entries with small heads of its own and keeps the best ``index_topk`` per query."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.topk = config.index_topk
        self.wq_b = nn.Linear(config.q_lora_rank, self.heads * self.dim, bias=False, dtype=dtype)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False, dtype=dtype)
        self.compressor = Compressor(config, "csa", self.dim, dtype)

    @torch.no_grad()
    def forward(self, x_TD: Tensor, q_TQ: Tensor, positions: Positions) -> Tensor | None:
        """int32 [T, k] of entries for the own tokens, -1 for none; None where all see at most k.

        The choice has no gradient: the language-model loss does not train the indexer.
        """
        if positions.most_visible("csa") <= self.topk:
            return None
        queries = self.wq_b(q_TQ).unflatten(-1, (self.heads, self.dim))
        queries = rotate(queries, positions.rotation("csa"))
        weights = self.weights_proj(x_TD).float() * (self.dim * self.heads) ** -0.5
        keys = self.compressor(x_TD, positions)
        return select_topk(queries, keys, weights, positions.ranges("csa"), self.topk)
