"""One layer: attention and mixture of experts, each around the residual streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.config import LayerType, ModelConfig
from model.hyper_connection import read, register_hyper_connection
from model.kernels.hyper_connection import write_streams
from model.moe import MoE, MoEStats
from model.norm import RMSNorm
from model.positions import Positions

BlockPart = Literal["streams", "norms", "attention", "block"]


class Compute(Protocol):
    """How a block calls its parts; see ``compute_now``."""

    def __call__(self, part: BlockPart, function: Callable[..., Any], *inputs: Any) -> Any:
        """The function's result."""


def compute_now(part: BlockPart, function: Callable[..., Any], *inputs: Any) -> Any:
    """Call the function, and keep what its backward needs."""
    return function(*inputs)


class Block(nn.Module):
    """X -> X with attention, then X -> X with the experts, over N streams [T, N, D].

    ``row`` is its number among the layers; the MTP block's comes after the last.
    trainer/parallel/recompute.py swaps ``compute`` for one that keeps less.
    """

    compute: Compute = staticmethod(compute_now)

    def __init__(
        self, config: ModelConfig, row: int, kind: LayerType, hashed: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config, self.row = config, row
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, kind, dtype)
        self.ffn = MoE(config, hashed, dtype)
        register_hyper_connection(self, "hc_attn", config)
        register_hyper_connection(self, "hc_ffn", config)

    def forward(
        self,
        streams_TND: Tensor,
        tokens_T: Tensor,
        positions: Positions,
        routed_tokens: float,
        chosen_TA: Tensor | None = None,
    ) -> tuple[Tensor, MoEStats]:
        """Returns the streams and what the router did; ``chosen_TA`` as in Router."""
        inputs = (streams_TND, tokens_T, positions, routed_tokens, chosen_TA)
        return self.compute("block", self._forward, *inputs)

    def _forward(
        self,
        streams_TND: Tensor,
        tokens_T: Tensor,
        positions: Positions,
        routed_tokens: float,
        chosen_TA: Tensor | None,
    ) -> tuple[Tensor, MoEStats]:
        streams_TND, x_TD, post_TN, comb_TNN = self._to_experts(streams_TND, positions)
        out_TD, stats = self.ffn(x_TD, tokens_T, positions, routed_tokens, chosen_TA)
        return write_streams(streams_TND, out_TD, post_TN, comb_TNN), stats

    def choose(self, streams_TND: Tensor, tokens_T: Tensor, positions: Positions) -> Tensor:
        """The experts that the router chooses, [T, A]; their work is not done."""
        _, x_TD, _, _ = self._to_experts(streams_TND, positions)
        return self.ffn.gate(x_TD, tokens_T).indices_TA

    def _to_experts(
        self, streams_TND: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Streams behind the attention, the experts' input, and how their output is written."""
        x_TD, post_TN, comb_TNN = read(self, "hc_attn", self.config, streams_TND)
        out_TD = self.compute("attention", self._attend, x_TD, positions)
        streams_TND = self.compute("streams", write_streams, streams_TND, out_TD, post_TN, comb_TNN)
        x_TD, post_TN, comb_TNN = read(self, "hc_ffn", self.config, streams_TND)
        return streams_TND, self.compute("norms", self.ffn_norm, x_TD), post_TN, comb_TNN

    def _attend(self, x_TD: Tensor, positions: Positions) -> Tensor:
        return self.attn(self.compute("norms", self.attn_norm, x_TD), positions)
