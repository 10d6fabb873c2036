"""Lightning indexer of a CSA layer: which compressed entries a query attends to (report 2.3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.compressor import Compressor
from model.config import ModelConfig
from model.kernels.hadamard import hadamard
from model.kernels.indexer import IndexerInputs, select_topk
from model.kernels.mxfp4 import fake_quantise
from model.kernels.norm import rotate
from model.positions import Positions


class Indexer(nn.Module):
    """Scores entries with small heads of its own and keeps the best ``index_topk`` per query.

    While `quantised` (model/qat.py), queries and keys are MXFP4 numbers, rotated before by a
    Hadamard matrix as in the official code: it spreads outliers and changes no product.
    """

    quantised: bool = False

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.topk = config.index_topk
        self.wq_b = nn.Linear(config.q_lora_rank, self.heads * self.dim, bias=False, dtype=dtype)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False, dtype=dtype)
        self.compressor = Compressor(config, "csa", self.dim, dtype)

    def forward(self, x_TD: Tensor, q_TQ: Tensor, positions: Positions) -> IndexerInputs:
        """Queries, head weights and keys, computed from inputs that get no gradient.

        The language-model loss does not train the indexer, nor does the indexer's the model.
        """
        x_TD, q_TQ = x_TD.detach(), q_TQ.detach()
        queries = self.wq_b(q_TQ).unflatten(-1, (self.heads, self.dim))
        queries = rotate(queries, positions.rotation("csa"))
        weights = self.weights_proj(x_TD).float() * (self.dim * self.heads) ** -0.5
        keys = self.compressor(x_TD, positions)
        if self.quantised:
            queries, keys = fake_quantise(hadamard(queries)), fake_quantise(hadamard(keys))
        return IndexerInputs(queries, keys, weights)

    @torch.no_grad()
    def select(
        self,
        x_TD: Tensor,
        q_TQ: Tensor,
        positions: Positions,
        index: IndexerInputs | None = None,
    ) -> Tensor | None:
        """int32 [T, k] of entries for the own tokens, -1 for none; None where all see at most k.

        `index` is what `forward` gave for the same inputs, where it was called.
        """
        if positions.most_visible("csa") <= self.topk:
            return None
        index = self(x_TD, q_TQ, positions) if index is None else index
        return select_topk(index, positions.ranges("csa"), self.topk)
