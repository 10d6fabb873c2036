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
from model.kernels.operations import ALL_EAGER, Kernels
from model.linear import UNQUANTISED, Linear, Matmuls
from model.positions import Positions


class Indexer(nn.Module):
    """Scores entries with small heads of its own; a query gets the ``index_topk`` best-scoring.

    While `fake_quantised` (model/qat.py), queries and keys are multiplied by a Hadamard matrix, as
    in the official code, and rounded to MXFP4. The matrix is orthogonal: it spreads outliers and
    changes no dot product.
    """

    fake_quantised: bool = False

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        kernels: Kernels = ALL_EAGER,
        matmuls: Matmuls = UNQUANTISED,
    ) -> None:
        super().__init__()
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.topk, self.kernels = config.index_topk, kernels
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.dim, dtype, matmuls)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False, dtype=dtype)
        self.compressor = Compressor(config, "index", self.dim, dtype, kernels)

    def forward(
        self, x_TD: Tensor, q_TQ: Tensor, positions: Positions, exchange: Exchange
    ) -> IndexerInputs:
        """Returns queries, keys and head weights, computed from detached inputs.

        The language-model loss does not train the indexer, and the indexer's objective does not
        train the model.
        """
        x_TD, q_TQ = x_TD.detach(), q_TQ.detach()
        queries = self.wq_b(q_TQ).unflatten(-1, (self.heads, self.dim))
        queries = rotate(queries, positions.rotation("csa"), self.kernels.norms)
        weights = self.weights_proj(x_TD).float() * (self.dim * self.heads) ** -0.5
        keys = self.compressor(x_TD, positions, exchange, self._rounded)
        return IndexerInputs(self._rounded(queries), keys, weights)

    def _rounded(self, x: Tensor) -> Tensor:
        """Rounds queries or keys [..., J] if they are `fake_quantised`."""
        return fake_quantise(hadamard(x)) if self.fake_quantised else x

    @torch.no_grad()
    def select(
        self,
        x_TD: Tensor,
        q_TQ: Tensor,
        positions: Positions,
        exchange: Exchange,
        inputs: IndexerInputs | None = None,
    ) -> Tensor | None:
        """Returns the entries selected for each local token, int32 [T, k], padded with -1.

        None if no token of the microbatch sees more than k. ``inputs`` is the result of ``forward``
        for the same arguments, if there is one.
        """
        if positions.max_visible("csa") <= self.topk:
            return None
        inputs = self(x_TD, q_TQ, positions, exchange) if inputs is None else inputs
        return select_topk(inputs, positions.ranges("csa"), self.topk, self.kernels.indexer)
