"""Multi-token prediction: one more block, which predicts the token after the next (V3 §2.2).

Letters: T tokens, N streams, D hidden size, A experts of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.block import Block, BlockStats
from model.config import ModelConfig
from model.exchange import Exchange
from model.execution import Execution
from model.linear import Linear
from model.norm import RMSNorm
from model.positions import Positions


class MTPBlock(Block):
    """A window-attention block with a learned router, fed by the main model's streams.

    They are combined with the next token's embedding. The block shares embedding and output head
    with the main model, and has its own final norm and hyper-connection head.
    """

    def __init__(
        self, config: ModelConfig, layer_index: int, dtype: torch.dtype, execution: Execution
    ) -> None:
        super().__init__(config, layer_index, "window", False, dtype, execution, with_head=True)
        dim, eps = config.hidden_size, config.rms_norm_eps
        matmuls, kernels = execution.matmuls, execution.kernels
        self.e_proj = Linear(dim, dim, dtype, matmuls)
        self.h_proj = Linear(dim, dim, dtype, matmuls)
        self.enorm = RMSNorm(dim, eps, kernels)
        self.hnorm = RMSNorm(dim, eps, kernels)
        self.norm = RMSNorm(dim, eps, kernels)

    def predict_hidden(
        self,
        streams_TND: Tensor,
        next_embedding_TD: Tensor,
        next_tokens_T: Tensor,
        positions: Positions,
        exchange: Exchange,
        loss_denominator: float,
        expert_indices_TA: Tensor | None = None,
    ) -> tuple[Tensor, BlockStats]:
        """Returns hidden states [T, D], from which the output head predicts t_{i+2} at position i.

        Args:
            streams_TND: the main model's streams before its own head.
            next_embedding_TD: embedding of t_{i+1}; unused at a sample's last position.
            next_tokens_T: the ids of t_{i+1}.
            expert_indices_TA: expert indices to use instead of routing now; see MoE.
        """
        streams_TND = self._combine(streams_TND, next_embedding_TD)
        streams_TND, stats = self(
            streams_TND, next_tokens_T, positions, exchange, loss_denominator, expert_indices_TA
        )
        return self.norm(self.hc_head(streams_TND)), stats

    def select_mtp_experts(
        self,
        streams_TND: Tensor,
        next_embedding_TD: Tensor,
        next_tokens_T: Tensor,
        positions: Positions,
        exchange: Exchange,
    ) -> Tensor:
        """Returns the expert indices that the router selects, [T, A].

        The arguments are those of ``predict_hidden``.
        """
        streams_TND = self._combine(streams_TND, next_embedding_TD)
        return self.select_experts(streams_TND, next_tokens_T, positions, exchange)

    def _combine(self, streams_TND: Tensor, next_embedding_TD: Tensor) -> Tensor:
        """Returns the streams that enter the block, [T, N, D]."""
        next_TND = self.e_proj(self.enorm(next_embedding_TD))[:, None]
        return next_TND + self.h_proj(self.hnorm(streams_TND))
