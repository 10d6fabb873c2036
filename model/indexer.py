"""Lightning indexer of a CSA layer: which compressed entries a query attends to (report §2.3.1).

Letters: T tokens, D hidden size, Q rank of the queries, I index heads, J their width, C entries,
k selected entries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.compressor import Compressor
from model.config import ModelConfig
from model.exchange import Exchange
from model.kernels.hadamard import hadamard
from model.kernels.indexer import IndexerInputs, select_topk
from model.kernels.mxfp4 import fake_quantise
from model.kernels.norm import rotate
from model.pointwise import EAGER_OR_TRITON, PointwiseOps
from model.positions import Positions


class Indexer(nn.Module):
    """Scores entries with small heads of its own and selects the ``index_topk`` best of a query.

    While `quantised` (model/qat.py), queries and keys are rotated by a Hadamard matrix, as in the
    official code, and rounded to MXFP4. The rotation spreads outliers and changes no dot product.
    """

    quantised: bool = False

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        pointwise: PointwiseOps = EAGER_OR_TRITON,
    ) -> None:
        super().__init__()
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.topk = config.index_topk
        self.wq_b = nn.Linear(config.q_lora_rank, self.heads * self.dim, bias=False, dtype=dtype)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False, dtype=dtype)
        self.compressor = Compressor(config, "csa", self.dim, dtype, pointwise)

    def forward(
        self, x_TD: Tensor, q_TQ: Tensor, positions: Positions, exchange: Exchange
    ) -> IndexerInputs:
        """Returns queries, keys and head weights, computed from detached inputs.

        The language-model loss does not train the indexer, and its objective not the model.
        """
        x_TD, q_TQ = x_TD.detach(), q_TQ.detach()
        queries = self.wq_b(q_TQ).unflatten(-1, (self.heads, self.dim))
        queries = rotate(queries, positions.rotation("csa"))
        weights = self.weights_proj(x_TD).float() * (self.dim * self.heads) ** -0.5
        keys = self.compressor(x_TD, positions, exchange)
        if self.quantised:
            queries, keys = fake_quantise(hadamard(queries)), fake_quantise(hadamard(keys))
        return IndexerInputs(queries, keys, weights)

    @torch.no_grad()
    def select(
        self,
        x_TD: Tensor,
        q_TQ: Tensor,
        positions: Positions,
        exchange: Exchange,
        index: IndexerInputs | None = None,
    ) -> Tensor | None:
        """Returns the local tokens' entries, int32 [T, k], -1 for none; None if all see k or fewer.

        ``index`` is the result of ``forward`` for the same inputs, if there is one.
        """
        if positions.max_visible("csa") <= self.topk:
            return None
        index = self(x_TD, q_TQ, positions, exchange) if index is None else index
        return select_topk(index, positions.ranges("csa"), self.topk)
