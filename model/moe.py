"""Mixture of experts: routed experts through grouped matrix products, and a shared one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.kernels.permute import collect_rows, spread_rows
from model.kernels.swiglu import clamped_swiglu
from model.layout import SampleLayout
from model.router import Router, Routing, balance_loss, expert_load


@dataclass(frozen=True)
class Dispatched:
    """Rows sorted by expert, ready for grouped products, and what brings them back."""

    rows_PD: Tensor
    weights_P: Tensor
    ends_E: Tensor
    order_P: Tensor
    place_P: Tensor


class LocalDispatch:
    """All experts are here: rows are only sorted. Expert parallelism swaps this object."""

    def dispatch(self, x_TD: Tensor, routing: Routing, experts: int) -> Dispatched:
        """Copy each token's row to each of its experts, in the order of experts."""
        expert_P = routing.indices_TA.flatten()
        order_P = torch.argsort(expert_P, stable=True)
        place_P = torch.empty_like(order_P)
        place_P[order_P] = torch.arange(len(order_P), device=order_P.device)
        ends_E = torch.bincount(expert_P, minlength=experts).cumsum(0).to(torch.int32)
        weights_P = routing.weights_TA.flatten()[order_P]
        return Dispatched(spread_rows(x_TD, order_P, place_P), weights_P, ends_E, order_P, place_P)

    def combine(self, y_PD: Tensor, sent: Dispatched, tokens: int) -> Tensor:
        """Sum each token's expert outputs, [T, D]."""
        return collect_rows(y_PD, sent.order_P, sent.place_P, tokens)


class Experts(nn.Module):
    """E clamped SwiGLU experts, their matrices stacked."""

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
        """w2(silu(min(w1 x, limit)) · clamp(w3 x, ±limit)) · weight for every row, [P, D]."""
        x, ends = sent.rows_PD, sent.ends_E
        gate = F.grouped_mm(x, self.w1.transpose(1, 2), offs=ends)
        up = F.grouped_mm(x, self.w3.transpose(1, 2), offs=ends)
        inner = clamped_swiglu(gate, up, self.limit, sent.weights_P)
        return F.grouped_mm(inner, self.w2.transpose(1, 2), offs=ends)


class SharedExpert(nn.Module):
    """The expert every token goes to; clamped like the routed ones."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        dim = config.hidden_size
        inner = config.moe_intermediate_size * config.n_shared_experts
        self.limit = config.swiglu_limit
        self.w1 = nn.Linear(dim, inner, bias=False, dtype=dtype)
        self.w2 = nn.Linear(inner, dim, bias=False, dtype=dtype)
        self.w3 = nn.Linear(dim, inner, bias=False, dtype=dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        return self.w2(clamped_swiglu(self.w1(x_TD), self.w3(x_TD), self.limit))


@dataclass(frozen=True)
class MoEStats:
    """What routing did: load per expert, and the balance loss (None in a hash layer)."""

    load_E: Tensor
    balance: Tensor | None


class MoE(nn.Module):
    """Router, routed experts and the shared expert."""

    def __init__(self, config: ModelConfig, hashed: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = Router(config, hashed, dtype)
        self.experts = Experts(config, dtype)
        self.shared_experts = SharedExpert(config, dtype)
        self.dispatch = LocalDispatch()

    def forward(
        self, x_TD: Tensor, tokens_T: Tensor, layout: SampleLayout, routed_tokens: float
    ) -> tuple[Tensor, MoEStats]:
        """[T, D] to [T, D]; ``routed_tokens`` is the balance loss's global denominator."""
        routing = self.gate(x_TD, tokens_T)
        sent = self.dispatch.dispatch(x_TD, routing, self.gate.experts)
        routed_TD = self.dispatch.combine(self.experts(sent), sent, x_TD.shape[0])
        balance = None if self.gate.hashed else balance_loss(routing, layout, routed_tokens)
        stats = MoEStats(expert_load(routing, layout), balance)
        return routed_TD + self.shared_experts(x_TD), stats
