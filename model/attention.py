"""V4's attention: low-rank queries, one shared key-value head, grouped output (report §2.3).

Letters: T tokens, D hidden size, Q rank of the queries, H heads, K head dim, C entries, k
selected entries of a query, G groups of heads, O rank of a group's output, X = H·K/G
input width of wo_a.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.compressor import Compressor
from model.config import AttentionMode, LayerType, ModelConfig
from model.exchange import Exchange
from model.execution import LOCAL, Execution
from model.indexer import Indexer
from model.kernels.attention import AttentionInputs, attention_with_lse2
from model.kernels.fp8.kv import fake_quantise_kv
from model.kernels.indexer import (
    IndexerInputs,
    KLTarget,
    MassFunction,
    attention_probability_mass,
    indexer_objective,
    selected_probability_mass,
)
from model.linear import Linear
from model.norm import RMSNorm
from model.positions import Positions


class _Inputs(NamedTuple):
    """Gathered queries of this rank's heads, keys of the local tokens only, gathered entries."""

    q_THK: Tensor
    kv_TK: Tensor
    entries_CK: Tensor | None


class Attention(nn.Module):
    """Window-only, compressed sparse ("csa") or heavily compressed ("hca") attention.

    While `fake_quantised` (model/qat.py), keys and entries are rounded as inference stores them.
    """

    fake_quantised: bool = False

    def __init__(
        self,
        config: ModelConfig,
        kind: LayerType,
        dtype: torch.dtype,
        execution: Execution = LOCAL,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.head_dim, self.rotary_dim = config.head_dim, config.qk_rope_head_dim
        self.o_rank = config.o_lora_rank
        self.eps, self.window = config.rms_norm_eps, config.sliding_window
        heads, groups = config.num_attention_heads, config.o_groups
        inner = heads * self.head_dim
        self.kernels = kernels = execution.kernels

        def linear(in_features: int, out_features: int) -> Linear:
            return Linear(in_features, out_features, dtype, execution.matmuls)

        self.wq_a = linear(config.hidden_size, config.q_lora_rank)
        self.q_norm = RMSNorm(config.q_lora_rank, self.eps, kernels)
        self.wq_b = linear(config.q_lora_rank, inner)
        self.wkv = linear(config.hidden_size, self.head_dim)
        self.kv_norm = RMSNorm(self.head_dim, self.eps, kernels)
        self.wo_a = linear(inner // groups, groups * self.o_rank)
        self.wo_b = linear(groups * self.o_rank, config.hidden_size)
        self.attn_sink = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.compressor = self.indexer = None
        if kind != "window":
            self.compressor = Compressor(config, kind, self.head_dim, dtype, kernels)
        if kind == "csa":
            self.indexer = Indexer(config, dtype, kernels, execution.matmuls)

    def forward(
        self,
        x_TD: Tensor,
        positions: Positions,
        exchange: Exchange,
        mode: AttentionMode = "select",
        loss_denominator: float = 1.0,
    ) -> tuple[Tensor, Tensor | None]:
        """[T, D] to [T, D], and the indexer's objective; no token sees another sample.

        The objective is summed over local tokens and divided by `loss_denominator`, the number of
        non-padding tokens in the global batch; None where the mode has none. Heads and groups are
        those of the weights on this rank: under tensor parallelism it holds only some of them, and
        `exchange` gathers the local tokens of all tensor ranks.
        """
        q_TQ, inputs = self._inputs(x_TD, positions, exchange)
        indexer_inputs = selected_Tk = None
        if self.indexer is not None and mode in ("warmup", "sparse"):
            indexer_inputs = self.indexer(x_TD, q_TQ, positions, exchange)
        if self.indexer is not None and mode in ("select", "sparse"):
            selected_Tk = self.indexer.select(x_TD, q_TQ, positions, exchange, indexer_inputs)
        query_selected_Tk = None
        if selected_Tk is not None:
            query_selected_Tk = exchange.gather_queries(selected_Tk)
        o_THK, mass = self._attend(inputs, positions, exchange, query_selected_Tk)
        objective = None
        if indexer_inputs is not None and mass is not None:
            objective = self._objective(
                indexer_inputs, selected_Tk, mass, positions, exchange, loss_denominator
            )
        return exchange.reduce_scatter_queries(self.wo_b(self._grouped_output(o_THK))), objective

    @torch.no_grad()
    def selected_and_total_mass(
        self, x_TD: Tensor, positions: Positions, exchange: Exchange
    ) -> tuple[Tensor, Tensor]:
        """Returns a CSA layer's attention probability mass of selected and of all entries.

        For every local token, fp32 [T] each: of the entries that the indexer would select, and of
        all visible entries, where attention is to all of them; see `selected_probability_mass`.
        """
        q_TQ, inputs = self._inputs(x_TD, positions, exchange)
        assert self.indexer is not None and inputs.entries_CK is not None
        selected_Tk = self.indexer.select(x_TD, q_TQ, positions, exchange)
        _, mass = self._attend(inputs, positions, exchange, None)
        assert mass is not None
        total_mass = exchange.sum_mass(self.kind, mass, selected_only=False)
        ranges, entries = positions.ranges(self.kind), len(inputs.entries_CK)
        return selected_probability_mass(total_mass, ranges, selected_Tk, entries)

    def _inputs(
        self, x_TD: Tensor, positions: Positions, exchange: Exchange
    ) -> tuple[Tensor, _Inputs]:
        """Returns the local tokens' low-rank queries q_TQ, and the inputs of core attention."""
        q_TQ = self.q_norm(self.wq_a(x_TD))
        q_THK = self.wq_b(exchange.gather_queries(q_TQ)).unflatten(-1, (-1, self.head_dim))
        kv_TK = self._rounded(self.kv_norm(self.wkv(x_TD), positions.rotation(self.kind)))
        entries_CK = None
        if self.compressor is not None:
            entries_CK = self.compressor(x_TD, positions, exchange, self._rounded)
        return q_TQ, _Inputs(q_THK, kv_TK, entries_CK)

    def _rounded(self, kv_NK: Tensor) -> Tensor:
        """Rounds keys or entries [N, K] if they are `fake_quantised`."""
        return fake_quantise_kv(kv_NK, self.rotary_dim) if self.fake_quantised else kv_NK

    def _attend(
        self,
        inputs: _Inputs,
        positions: Positions,
        exchange: Exchange,
        selected_Tk: Tensor | None,
    ) -> tuple[Tensor, MassFunction | None]:
        """Returns core attention's output [T, H, K], and a function for the entries' mass.

        The function gives the probability mass of each entry; None in window layers.
        """
        entries_CK = inputs.entries_CK
        if self.compressor is not None and entries_CK is not None:
            kind = self.compressor.entries
            entries_CK = exchange.attended_entries(entries_CK, kind, selected_Tk)
        attention = AttentionInputs(
            inputs.q_THK,
            exchange.gather_keys(inputs.kv_TK),
            entries_CK,
            self.attn_sink,
            positions.query_rotation(self.kind),
            positions.query_ranges(self.kind),
            selected_Tk,
            window=self.window,
            norm_eps=self.eps,
        )
        o_THK, lse2_TH = attention_with_lse2(attention, self.kernels.attention)
        if entries_CK is None:
            return o_THK, None
        return o_THK, attention_probability_mass(attention, lse2_TH, self.kernels.attention)

    def _objective(
        self,
        indexer_inputs: IndexerInputs,
        selected_Tk: Tensor | None,
        mass: MassFunction,
        positions: Positions,
        exchange: Exchange,
        loss_denominator: float,
    ) -> Tensor:
        """Sums the KL loss over local tokens.

        The target is detached, and padding tokens have weight 0.
        """
        weight_T = (~positions.layout.padding_T).to(torch.float32) / loss_denominator
        total_mass = exchange.sum_mass(self.kind, mass, selected_only=selected_Tk is not None)
        target = KLTarget(total_mass, positions.ranges(self.kind), selected_Tk)
        return indexer_objective(indexer_inputs, target, weight_T, self.kernels.indexer_loss)

    def _grouped_output(self, o_THK: Tensor) -> Tensor:
        """Multiplies each group of heads by its own matrix: [T, H, K] to [T, G·O]."""
        weight_GOX = self.wo_a.weight.unflatten(0, (-1, self.o_rank))
        o_GTX = o_THK.reshape(o_THK.shape[0], len(weight_GOX), -1).transpose(0, 1)
        return self.wo_a.matmuls.batched(o_GTX, weight_GOX).transpose(0, 1).flatten(1)
