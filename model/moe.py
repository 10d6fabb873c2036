"""Mixture of experts: routed experts through grouped matmuls, and a shared one (report §2.1).

Letters: T tokens, D hidden size, E experts, A experts of a token, F inner width, L = T·A pairs of a
token and a choice, P >= L rows sorted by expert, with each expert's rows padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.kernels.mxfp4 import straight_through
from model.kernels.permute import collect_rows, spread_rows
from model.linear import PLAIN, Linear, Products
from model.pointwise import CHOSEN, Operations
from model.positions import Positions
from model.router import Router, Routing, balance_loss, expert_load, first_share

ROW_ALIGNMENT = 16
"""Every expert's rows are padded to a multiple of this. Grouped matmuls want aligned groups, and
matmuls of a handful of rows take other code paths, which round differently: with padding, a token's
output does not depend on which experts other tokens chose."""


@dataclass(frozen=True)
class Dispatched:
    """Rows sorted by expert, ready for grouped matmuls, and the way back to their tokens.

    Padding rows have weight 0, and so no effect and no gradient; rows after the last expert's end
    are not computed at all.
    """

    rows_PD: Tensor
    weights_P: Tensor
    ends_E: Tensor
    order_P: Tensor
    place_L: Tensor


class LocalDispatch:
    """Sorts rows by expert on one rank. Expert parallelism swaps this object."""

    def dispatch(self, x_TD: Tensor, routing: Routing, experts: int) -> Dispatched:
        """Copies each token's row to each of its experts, in the order of experts.

        P follows from the shapes alone, so that the host does not wait for the device.
        """
        expert_L = routing.indices_TA.flatten()
        pairs = len(expert_L)
        count_E = count_each(expert_L, experts)
        padded_E = (count_E + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT
        ends_E = padded_E.cumsum(0)
        shift_E = (ends_E - padded_E) - (count_E.cumsum(0) - count_E)
        sorted_L = torch.argsort(expert_L, stable=True)
        place = torch.arange(pairs, device=expert_L.device) + shift_E[expert_L[sorted_L]]
        places = pairs + min(experts, pairs) * (ROW_ALIGNMENT - 1)
        order_P = sorted_L.new_zeros(places).index_copy_(0, place, sorted_L)
        place_L = torch.empty_like(sorted_L).index_copy_(0, sorted_L, place)
        weights_L = routing.weights_TA.flatten()
        weights_P = weights_L.new_zeros(places).index_copy(0, place_L, weights_L)
        rows_PD = spread_rows(x_TD, order_P, place_L)
        return Dispatched(rows_PD, weights_P, ends_E.to(torch.int32), order_P, place_L)

    def combine(self, y_PD: Tensor, sent: Dispatched, tokens: int) -> Tensor:
        """Sums each token's expert outputs to [T, D]."""
        return collect_rows(y_PD, sent.order_P, sent.place_L, tokens)


def count_each(index_L: Tensor, size: int) -> Tensor:
    """Counts each number below ``size``, int64; unlike bincount without a device sync."""
    return index_L.new_zeros(size).index_add_(0, index_L, torch.ones_like(index_L))


class Dispatch(Protocol):
    """Brings tokens to their experts and back; see LocalDispatch."""

    def dispatch(self, x_TD: Tensor, routing: Routing, experts: int) -> Dispatched:
        """Returns the rows of this rank's experts, sorted by expert."""

    def combine(self, y_PD: Tensor, sent: Dispatched, tokens: int) -> Tensor:
        """Sums each token's expert outputs to [T, D]."""


class Experts(nn.Module):
    """E clamped SwiGLU experts, their matrices stacked.

    While ``rounded`` is set (model/qat.py), forward multiplies with it instead of w1, w2, w3.
    """

    rounded: tuple[Tensor, Tensor, Tensor] | None = None
    products: Products = PLAIN
    operations: Operations = CHOSEN

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
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
        product = self.products.grouped
        inner = self.operations.clamped_swiglu(
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

    operations: Operations = CHOSEN

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        dim = config.hidden_size
        inner = config.moe_intermediate_size * config.n_shared_experts
        self.limit = config.swiglu_limit
        self.w1 = Linear(dim, inner, dtype)
        self.w2 = Linear(inner, dim, dtype)
        self.w3 = Linear(dim, inner, dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        gate, up = self.w1(x_TD), self.w3(x_TD)
        return self.w2(self.operations.clamped_swiglu(gate, up, self.limit))


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

    def __init__(self, config: ModelConfig, hashed: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = Router(config, hashed, dtype)
        self.experts = Experts(config, dtype)
        self.shared_experts = SharedExpert(config, dtype)
        self.dispatch: Dispatch = LocalDispatch()

    def forward(
        self,
        x_TD: Tensor,
        tokens_T: Tensor,
        positions: Positions,
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
            balance = balance_loss(routing, positions.layout, routed_tokens, positions.sum_counts)
        shared_TD = positions.to_own(self.shared_experts(positions.to_queries(x_TD)))
        load_E = expert_load(routing, positions.layout)
        stats = MoEStats(
            load_E, first_share(routing, positions.layout), balance, routing.indices_TA
        )
        return routed_TD + shared_TD, stats
