"""One layer: attention and mixture of experts, each around the residual streams."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.config import LayerType, ModelConfig
from model.hyper_connection import register_hyper_connection, through_streams
from model.moe import MoE, MoEStats
from model.norm import RMSNorm
from model.positions import Positions


class Block(nn.Module):
    """X -> X with attention, then X -> X with the experts, over N streams [T, N, D]."""

    def __init__(
        self, config: ModelConfig, kind: LayerType, hashed: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config = config
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, kind, dtype)
        self.ffn = MoE(config, hashed, dtype)
        register_hyper_connection(self, "hc_attn", config)
        register_hyper_connection(self, "hc_ffn", config)

    def forward(
        self, streams_TND: Tensor, tokens_T: Tensor, positions: Positions, routed_tokens: float
    ) -> tuple[Tensor, MoEStats]:
        """Returns the streams and what the router did."""
        stats: list[MoEStats] = []

        def attend(x_TD: Tensor) -> Tensor:
            return self.attn(self.attn_norm(x_TD), positions)

        def mix_experts(x_TD: Tensor) -> Tensor:
            out, seen = self.ffn(self.ffn_norm(x_TD), tokens_T, positions, routed_tokens)
            stats.append(seen)
            return out

        streams_TND = through_streams(self, "hc_attn", self.config, streams_TND, attend)
        streams_TND = through_streams(self, "hc_ffn", self.config, streams_TND, mix_experts)
        return streams_TND, stats[0]
