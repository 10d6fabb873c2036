"""Mixture of experts: routed experts through grouped matmuls, and a shared one (report §2.1).

Letters: T tokens, D hidden size, E experts, A experts of a token, F inner width, P rows sorted
by expert, with each expert's rows padded.
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
from model.kernels.swiglu import clamped_swiglu
from model.linear import Linear
from model.positions import Positions
from model.router import Router, balance_loss


class Experts(nn.Module):
    """E clamped SwiGLU experts, their matrices stacked.

    While ``rounded`` holds MXFP4-rounded weights (model/qat.py), forward uses them in place of w1,
    w2 and w3; the gradients go to w1, w2 and w3.
    """

    rounded: tuple[Tensor, Tensor, Tensor] | None = None

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, execution: Execution = LOCAL
    ) -> None:
        super().__init__()
        self.execution = execution
        num_experts, hidden = config.n_routed_experts, config.hidden_size
        intermediate = config.moe_intermediate_size
        self.limit = config.swiglu_limit
        self.w1 = nn.Parameter(torch.empty(num_experts, intermediate, hidden, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden, intermediate, dtype=dtype))
        self.w3 = nn.Parameter(torch.empty(num_experts, intermediate, hidden, dtype=dtype))

    def forward(self, dispatched: Dispatched) -> Tensor:
        """Returns weight · w2(silu(min(w1 x, limit)) · clamp(w3 x, ±limit)) of each row, [P, D]."""
        x, ends = dispatched.rows_PD, dispatched.ends_E
        w1, w2, w3 = self._matrices()
        matmuls, choice = self.execution.matmuls, self.execution.kernels.swiglu
        gate, up = matmuls.grouped_pair(x, w1, w3, ends)
        inner = clamped_swiglu(gate, up, self.limit, dispatched.weights_P, choice)
        return matmuls.grouped(inner, w2, ends)

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
        hidden = config.hidden_size
        intermediate = config.moe_intermediate_size
        self.limit = config.swiglu_limit
        self.w1 = Linear(hidden, intermediate, dtype, execution.matmuls)
        self.w2 = Linear(intermediate, hidden, dtype, execution.matmuls)
        self.w3 = Linear(hidden, intermediate, dtype, execution.matmuls)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        gate, up = self.w1(x_TD), self.w3(x_TD)
        return self.w2(clamped_swiglu(gate, up, self.limit, choice=self.execution.kernels.swiglu))


@dataclass(frozen=True)
class MoEStats:
    """A layer's routing and its loss.

    Attributes:
        balance: the balance loss; None in a hash layer, or where its weight is 0.
        expert_indices_TA: indices of the experts that each token went to.
        weights_TA: their routing weights, without a gradient.
    """

    balance: Tensor | None
    expert_indices_TA: Tensor
    weights_TA: Tensor


class MoE(nn.Module):
    """Router, routed experts and the shared expert."""

    def __init__(
        self, config: ModelConfig, hashed: bool, dtype: torch.dtype, execution: Execution
    ) -> None:
        super().__init__()
        self.gate = Router(config, hashed, dtype)
        self.has_balance_loss = not hashed and config.balance_loss_weight > 0
        self.experts = Experts(config, dtype, execution)
        self.shared_experts = SharedExpert(config, dtype, execution)
        self.dispatch = execution.dispatch

    def forward(
        self,
        x_TD: Tensor,
        tokens_T: Tensor,
        positions: Positions,
        exchange: Exchange,
        loss_denominator: float,
        expert_indices_TA: Tensor | None = None,
    ) -> tuple[Tensor, MoEStats]:
        """[T, D] to [T, D], and the routing's statistics and loss.

        ``loss_denominator`` is the balance loss's, the number of non-padding tokens in the global
        batch. ``expert_indices_TA``: expert indices to use instead of routing now (anticipatory
        routing, trainer/stability/anticipation.py).
        """
        routing = self.gate(x_TD, tokens_T, expert_indices_TA)
        pending_rows = self.dispatch.begin(x_TD, routing, self.gate.num_experts)
        # Over expert ranks the host now waits for numbers of rows, and the device has this to do.
        shared_TD = exchange.reduce_scatter_queries(
            self.shared_experts(exchange.gather_queries(x_TD))
        )
        dispatched = pending_rows()
        routed_TD = self.dispatch.combine(self.experts(dispatched), dispatched, x_TD.shape[0])
        balance = None
        if self.has_balance_loss:
            balance = balance_loss(routing, positions.layout, loss_denominator, exchange.sum_counts)
        stats = MoEStats(balance, routing.indices_TA, routing.weights_TA.detach())
        return routed_TD + shared_TD, stats
