"""Mixture of experts: routed experts through grouped matmuls, and a shared one (report §2.1).

Letters: T tokens, D hidden size, E experts, A experts of a token, F inner width, L = T·A pairs of a
token and a choice, P >= L rows sorted by expert, with each expert's rows padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.dispatch import Dispatched
from model.exchange import Exchange
from model.execution import LOCAL, Execution
from model.kernels.mxfp4 import straight_through
from model.linear import Linear
from model.positions import Positions
from model.router import Router, balance_loss, expert_load, first_share


class Experts(nn.Module):
    """E clamped SwiGLU experts, their matrices stacked.

    While ``rounded`` is set (model/qat.py), forward multiplies with it instead of w1, w2, w3.
    """

    rounded: tuple[Tensor, Tensor, Tensor] | None = None

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, execution: Execution = LOCAL
    ) -> None:
        super().__init__()
        self.execution = execution
        experts, dim, inner = (
            config.n_routed_experts,
            config.hidden_size,
            config.moe_intermediate_size,
        )
        self.limit = config.swiglu_limit
        self.w1 = nn.Parameter(torch.empty(experts, inner, dim, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(experts, dim, inner, dtype=dtype))
        self.w3 = nn.Parameter(torch.empty(experts, inner, dim, dtype=dtype))

    def forward(self, sent: Dispatched) -> Tensor:
        """Returns w2(silu(min(w1 x, limit)) · clamp(w3 x, ±limit)) · weight of each row, [P, D]."""
        x, ends = sent.rows_PD, sent.ends_E
        w1, w2, w3 = self._matrices()
        product = self.execution.matmuls.grouped
        inner = self.execution.pointwise.clamped_swiglu(
            product(x, w1, ends), product(x, w3, ends), self.limit, sent.weights_P
        )
        return product(inner, w2, ends)

    def _matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the matrices to multiply with; their gradients go to w1, w2 and w3."""
        if self.rounded is None:
            return self.w1, self.w2, self.w3
        w1, w2, w3 = self.rounded
        return (
            straight_through(self.w1, w1),
            straight_through(self.w2, w2),
            straight_through(self.w3, w3),
        )


class SharedExpert(nn.Module):
    """The expert that every token goes to, clamped like the routed ones."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, execution: Execution) -> None:
        super().__init__()
        self.execution = execution
        dim = config.hidden_size
        inner = config.moe_intermediate_size * config.n_shared_experts
        self.limit = config.swiglu_limit
        self.w1 = Linear(dim, inner, dtype, execution.matmuls)
        self.w2 = Linear(inner, dim, dtype, execution.matmuls)
        self.w3 = Linear(dim, inner, dtype, execution.matmuls)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        gate, up = self.w1(x_TD), self.w3(x_TD)
        return self.w2(self.execution.pointwise.clamped_swiglu(gate, up, self.limit))


@dataclass(frozen=True)
class MoEStats:
    """Statistics and loss of a layer's routing.

    Attributes:
        load_E: tokens routed to each expert.
        first_share: 0-dim, sum over tokens of the largest weight's share of a token's weights.
        balance: the balance loss; None in a hash layer.
        chosen_TA: the experts of each token.
    """

    load_E: Tensor
    first_share: Tensor
    balance: Tensor | None
    chosen_TA: Tensor


class MoE(nn.Module):
    """Router, routed experts and the shared expert."""

    def __init__(
        self, config: ModelConfig, hashed: bool, dtype: torch.dtype, execution: Execution
    ) -> None:
        super().__init__()
        self.gate = Router(config, hashed, dtype)
        self.experts = Experts(config, dtype, execution)
        self.shared_experts = SharedExpert(config, dtype, execution)
        self.dispatch = execution.dispatch

    def forward(
        self,
        x_TD: Tensor,
        tokens_T: Tensor,
        positions: Positions,
        exchange: Exchange,
        routed_tokens: float,
        chosen_TA: Tensor | None = None,
    ) -> tuple[Tensor, MoEStats]:
        """[T, D] to [T, D]; ``routed_tokens`` is the balance loss's global denominator.

        ``chosen_TA`` are experts chosen earlier; see Router.
        """
        routing = self.gate(x_TD, tokens_T, chosen_TA)
        sent = self.dispatch.dispatch(x_TD, routing, self.gate.experts)
        routed_TD = self.dispatch.combine(self.experts(sent), sent, x_TD.shape[0])
        balance = None
        if not self.gate.hashed:
            balance = balance_loss(routing, positions.layout, routed_tokens, exchange.sum_counts)
        shared_TD = exchange.scatter_sum(self.shared_experts(exchange.gather_queries(x_TD)))
        load_E = expert_load(routing, positions.layout)
        stats = MoEStats(
            load_E, first_share(routing, positions.layout), balance, routing.indices_TA
        )
        return routed_TD + shared_TD, stats
