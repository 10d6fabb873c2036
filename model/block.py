"""One layer: attention and mixture of experts, connected to the residual streams.

Letters: T tokens, N streams, D hidden size, A experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.config import AttentionMode, LayerType, ModelConfig
from model.exchange import Exchange
from model.execution import Execution
from model.hyper_connection import HyperConnection, StreamsHead
from model.moe import MoE, MoEStats
from model.norm import RMSNorm
from model.positions import Positions


@dataclass(frozen=True)
class BlockStats(MoEStats):
    """Statistics and losses of a block; ``indexer`` is its indexer's objective, if any."""

    indexer: Tensor | None = None


class Block(nn.Module):
    """Attention, then the experts, each reading from and writing to the streams [T, N, D].

    ``row`` is its number among the layers; the MTP block's number follows the last layer's.
    ``streams_end`` adds a head that collapses the streams.
    """

    def __init__(
        self,
        config: ModelConfig,
        row: int,
        kind: LayerType,
        hashed: bool,
        dtype: torch.dtype,
        execution: Execution,
        streams_end: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.row, self.compute = config, row, execution.compute
        pointwise = execution.pointwise
        self.hc_attn = HyperConnection(config, pointwise)
        self.hc_ffn = HyperConnection(config, pointwise)
        if streams_end:
            self.hc_head = StreamsHead(config, pointwise)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, pointwise)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, pointwise)
        self.attn = Attention(config, kind, dtype, execution)
        self.ffn = MoE(config, hashed, dtype, execution)

    def forward(
        self,
        streams_TND: Tensor,
        tokens_T: Tensor,
        positions: Positions,
        exchange: Exchange,
        routed_tokens: float,
        chosen_TA: Tensor | None = None,
        mode: AttentionMode = "select",
    ) -> tuple[Tensor, BlockStats]:
        """Returns the streams, and the statistics and losses of router and indexer.

        ``chosen_TA`` as in Router, ``mode`` as in Attention.
        """
        inputs = (streams_TND, tokens_T, positions, exchange, routed_tokens, chosen_TA, mode)
        return self.compute("block", self._forward, *inputs)

    def _forward(
        self,
        streams_TND: Tensor,
        tokens_T: Tensor,
        positions: Positions,
        exchange: Exchange,
        routed_tokens: float,
        chosen_TA: Tensor | None,
        mode: AttentionMode,
    ) -> tuple[Tensor, BlockStats]:
        before = self._to_experts(streams_TND, positions, exchange, mode, routed_tokens)
        streams_TND, x_TD, post_TN, comb_TNN, indexer = before
        out_TD, stats = self.ffn(x_TD, tokens_T, positions, exchange, routed_tokens, chosen_TA)
        streams_TND = self.hc_ffn.write(streams_TND, out_TD, post_TN, comb_TNN)
        return streams_TND, BlockStats(**vars(stats), indexer=indexer)

    def choose(
        self, streams_TND: Tensor, tokens_T: Tensor, positions: Positions, exchange: Exchange
    ) -> Tensor:
        """Returns the experts that the router chooses, [T, A], without computing them."""
        x_TD = self._to_experts(streams_TND, positions, exchange)[1]
        return self.ffn.gate(x_TD, tokens_T).indices_TA

    def _to_experts(
        self,
        streams_TND: Tensor,
        positions: Positions,
        exchange: Exchange,
        mode: AttentionMode = "select",
        routed_tokens: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Returns the streams after attention, the experts' input, post, comb, and the indexer's
        objective.
        """
        x_TD, post_TN, comb_TNN = self.hc_attn.read(streams_TND)
        inputs = (x_TD, positions, exchange, mode, routed_tokens)
        out_TD, indexer = self.compute("attention", self._attend, *inputs)
        streams_TND = self.compute(
            "streams", self.hc_attn.write, streams_TND, out_TD, post_TN, comb_TNN
        )
        x_TD, post_TN, comb_TNN = self.hc_ffn.read(streams_TND)
        x_TD = self.compute("norms", self.ffn_norm, x_TD)
        return streams_TND, x_TD, post_TN, comb_TNN, indexer

    def _attend(
        self,
        x_TD: Tensor,
        positions: Positions,
        exchange: Exchange,
        mode: AttentionMode,
        routed_tokens: float,
    ) -> tuple[Tensor, Tensor | None]:
        x_TD = self.compute("norms", self.attn_norm, x_TD)
        return self.attn(x_TD, positions, exchange, mode, routed_tokens)
