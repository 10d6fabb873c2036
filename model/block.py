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
from model.hyper_connection import HyperConnection, HyperConnectionHead
from model.moe import MoE, MoEStats
from model.norm import RMSNorm
from model.positions import Positions


@dataclass(frozen=True)
class BlockStats(MoEStats):
    """Statistics and losses of a block; ``indexer`` is its indexer's objective, if any."""

    indexer: Tensor | None = None


class Block(nn.Module):
    """Attention, then the experts, each reading from and writing to the streams [T, N, D].

    ``layer_index`` is its index among the layers; the MTP block's is ``num_hidden_layers``.
    ``with_head`` adds a head that collapses the streams.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer_index: int,
        kind: LayerType,
        hashed: bool,
        dtype: torch.dtype,
        execution: Execution,
        with_head: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.layer_index, self.call_part = config, layer_index, execution.call_part
        kernels = execution.kernels
        self.hc_attn = HyperConnection(config, kernels)
        self.hc_ffn = HyperConnection(config, kernels)
        if with_head:
            self.hc_head = HyperConnectionHead(config, kernels)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.attn = Attention(config, kind, dtype, execution)
        self.ffn = MoE(config, hashed, dtype, execution)

    def forward(
        self,
        streams_TND: Tensor,
        tokens_T: Tensor,
        positions: Positions,
        exchange: Exchange,
        loss_denominator: float,
        expert_indices_TA: Tensor | None = None,
        mode: AttentionMode = "select",
    ) -> tuple[Tensor, BlockStats]:
        """Returns the streams, and the statistics and losses of router and indexer.

        ``expert_indices_TA`` as in Router, ``mode`` as in Attention.
        """
        inputs = (
            streams_TND,
            tokens_T,
            positions,
            exchange,
            loss_denominator,
            expert_indices_TA,
            mode,
        )
        return self.call_part("block", self._forward, *inputs)

    def _forward(
        self,
        streams_TND: Tensor,
        tokens_T: Tensor,
        positions: Positions,
        exchange: Exchange,
        loss_denominator: float,
        expert_indices_TA: Tensor | None,
        mode: AttentionMode,
    ) -> tuple[Tensor, BlockStats]:
        streams_TND, x_TD, post_TN, comb_TNN, indexer = self._attention_sublayer(
            streams_TND, positions, exchange, mode, loss_denominator
        )
        out_TD, stats = self.ffn(
            x_TD, tokens_T, positions, exchange, loss_denominator, expert_indices_TA
        )
        streams_TND = self.hc_ffn.write(streams_TND, out_TD, post_TN, comb_TNN)
        return streams_TND, BlockStats(**vars(stats), indexer=indexer)

    def select_experts(
        self, streams_TND: Tensor, tokens_T: Tensor, positions: Positions, exchange: Exchange
    ) -> Tensor:
        """Returns indices of the experts that the router selects, [T, A]; no expert is run."""
        _, x_TD, *_ = self._attention_sublayer(streams_TND, positions, exchange)
        return self.ffn.gate(x_TD, tokens_T).indices_TA

    def _attention_sublayer(
        self,
        streams_TND: Tensor,
        positions: Positions,
        exchange: Exchange,
        mode: AttentionMode = "select",
        loss_denominator: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Returns the streams after attention, and what the experts' sub-layer starts from.

        That is the experts' input and hc_ffn's post and comb. Last comes the indexer's objective.
        """
        x_TD, post_TN, comb_TNN = self.hc_attn.read(streams_TND)
        exchange = exchange.of_layer(self.layer_index)
        inputs = (x_TD, positions, exchange, mode, loss_denominator)
        out_TD, indexer = self.call_part("attention", self._attend, *inputs)
        streams_TND = self.call_part(
            "streams", self.hc_attn.write, streams_TND, out_TD, post_TN, comb_TNN
        )
        x_TD, post_TN, comb_TNN = self.hc_ffn.read(streams_TND)
        x_TD = self.call_part("norms", self.ffn_norm, x_TD)
        return streams_TND, x_TD, post_TN, comb_TNN, indexer

    def _attend(
        self,
        x_TD: Tensor,
        positions: Positions,
        exchange: Exchange,
        mode: AttentionMode,
        loss_denominator: float,
    ) -> tuple[Tensor, Tensor | None]:
        x_TD = self.call_part("norms", self.attn_norm, x_TD)
        return self.attn(x_TD, positions, exchange, mode, loss_denominator)
