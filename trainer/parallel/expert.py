"""Dispatches tokens to the ranks of their experts and combines the results: dropless, unpadded.

One all-to-all sends the numbers of rows, one the rows, one their weights, and one sends the results
back. Only rows that a rank's experts need are sent.

Letters: T tokens, A experts of a token, L = T·A·(expert-tensor ranks) sent rows, P received rows,
D hidden size, R ranks of the expert axis, E experts of one rank (elsewhere: of all).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.dispatch import Dispatched, LocalDispatch, count_each
from model.kernels.permute import permute_rows, unpermute_rows
from model.router import Routing
from trainer.parallel.collectives import all_to_all, all_to_all_tokens
from trainer.parallel.grid import Grid


@dataclass(frozen=True)
class _DispatchState(Dispatched):
    """Rows received from all ranks, sorted by expert, and how this rank's rows were sent."""

    send: list[int]
    receive: list[int]
    order_L: Tensor
    sent_place_L: Tensor
    rows: int


class ExpertDispatch:
    """`LocalDispatch` where experts are divided over the ranks of the grid's expert axis.

    Expert e is on the expert_tensor ranks of expert rank e // E_local. Each of them gets the rows
    of its experts and returns partial sums over its part of the inner dimension.
    """

    def __init__(self, grid: Grid) -> None:
        self.axis = grid.expert_all_to_all
        self.parts = grid.expert_tensor.size
        self.local = LocalDispatch()

    def dispatch(self, x_TD: Tensor, routing: Routing, num_experts: int) -> _DispatchState:
        """Copies each token's row to the ranks of its experts, which sort them by expert.

        The numbers of rows are known to the host only once all ranks have counted: the one wait
        for the device in a layer.
        """
        local_experts = num_experts * self.parts // self.axis.size
        slot_L = self._slots(routing.indices_TA, local_experts).flatten()
        weights_L = routing.weights_TA.repeat_interleave(self.parts, dim=1).flatten()
        order_L = torch.argsort(slot_L, stable=True)
        place_L = torch.empty_like(order_L)
        place_L[order_L] = torch.arange(len(order_L), device=order_L.device)
        received_RE, send, receive = self.exchange_counts(slot_L, local_experts)
        rows_PD = all_to_all_tokens(permute_rows(x_TD, order_L, place_L), send, receive, self.axis)
        weights_P = all_to_all_tokens(weights_L[order_L], send, receive, self.axis)
        number_P = torch.arange(local_experts, device=x_TD.device).repeat(self.axis.size)
        expert_P = number_P.repeat_interleave(received_RE.flatten(), output_size=sum(receive))
        # One more row, of weight 0: a rank that received no row runs the same matmuls.
        rows_PD, weights_P = F.pad(rows_PD, (0, 0, 0, 1)), F.pad(weights_P, (0, 1))
        expert_P = F.pad(expert_P, (0, 1))
        received = Routing(expert_P[:, None], weights_P[:, None], routing.scores_TE)
        local = self.local.dispatch(rows_PD, received, local_experts)
        return _DispatchState(
            **vars(local),
            send=send,
            receive=receive,
            order_L=order_L,
            sent_place_L=place_L,
            rows=len(rows_PD),
        )

    def exchange_counts(
        self, slot_L: Tensor, local_experts: int
    ) -> tuple[Tensor, list[int], list[int]]:
        """Exchanges row counts: by rank and local expert, and sums by rank."""
        count_RE = count_each(slot_L, self.axis.size * local_experts).view(-1, local_experts)
        ones = [1] * self.axis.size
        received_RE = all_to_all(count_RE, ones, ones, self.axis)
        send, receive = torch.stack([count_RE.sum(1), received_RE.sum(1)]).tolist()
        return received_RE, send, receive

    def combine(self, y_PD: Tensor, dispatched: Dispatched, num_tokens: int) -> Tensor:
        """Sends the experts' outputs back to their tokens' ranks and sums each token's, [T, D]."""
        assert isinstance(dispatched, _DispatchState)
        rows_PD = self.local.combine(y_PD, dispatched, dispatched.rows)[:-1]
        back_LD = all_to_all_tokens(rows_PD, dispatched.receive, dispatched.send, self.axis)
        return unpermute_rows(back_LD, dispatched.order_L, dispatched.sent_place_L, num_tokens)

    def _slots(self, indices_TA: Tensor, local_experts: int) -> Tensor:
        """rank · E_local + expert on that rank, for each of the parts of each chosen expert."""
        owner, number = indices_TA // local_experts, indices_TA % local_experts
        part = torch.arange(self.parts, device=indices_TA.device)
        slots = (owner[..., None] * self.parts + part) * local_experts + number[..., None]
        return slots.flatten(1)
