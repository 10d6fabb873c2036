"""Dispatches tokens to the ranks of their experts and combines the results: dropless, unpadded.

One all-to-all sends the numbers of rows, one the rows, one their weights, and one sends the results
back. Only rows that a rank's experts need are sent. NCCL takes the sizes from the host, which waits
for the numbers; what `begin` has launched by then, and the caller after it, keeps the device busy.

Letters: T tokens, A experts of a token, L sent rows = T·A·(expert-tensor degree), M received rows,
P rows of `LocalDispatch`, padded, D hidden size, R ranks of the expert all-to-all, E experts of the
model, e experts of one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.dispatch import Dispatched, LocalDispatch, PendingRows, count_each
from model.kernels.operations import EAGER, Choice
from model.kernels.permute import permute_rows, unpermute_rows
from model.router import Routing
from trainer.parallel.collectives import all_to_all, all_to_all_tokens
from trainer.parallel.grid import Grid

Counts = tuple[Tensor, list[int], list[int]]
"""Rows received by rank and expert [R, e], and the numbers of rows to send and to receive by rank.
"""


@dataclass(frozen=True)
class _DispatchState(Dispatched):
    """Rows received from all ranks, sorted by expert, and how this rank's rows were sent.

    The inherited attributes are about received rows: their pairs are the M received rows.

    Attributes:
        send, receive: numbers of rows sent to and received from each rank.
        token_of_sent_L: the token in each sent row.
        sent_of_copy_L: the sent row of each copy. Copies are (token, expert, shard of the expert)
            triples in this order.
        num_received_rows: received rows, with the dummy row.
    """

    send: list[int]
    receive: list[int]
    token_of_sent_L: Tensor
    sent_of_copy_L: Tensor
    num_received_rows: int


class ExpertDispatch:
    """Dispatch with experts sharded over the ranks of the grid's `expert_all_to_all` axis.

    Expert i is on the expert_tensor ranks of expert rank i // e. Each of them gets the rows of its
    experts and returns partial sums over its shard of the inner dimension.
    """

    def __init__(self, grid: Grid, choice: Choice = EAGER) -> None:
        self.axis = grid.expert_all_to_all
        self.expert_tensor_size = grid.expert_tensor.size
        self.local = LocalDispatch(choice)

    def begin(self, x_TD: Tensor, routing: Routing, num_experts: int) -> PendingRows:
        """Begins to copy each token's row to the ranks of its experts, which sort them by expert.

        In the returned call the host waits for the exchanged row counts, the only wait in a layer.
        """
        local_experts = num_experts * self.expert_tensor_size // self.axis.size
        destination_L = self._destinations(routing.indices_TA, local_experts).flatten()
        weights_L = routing.weights_TA.repeat_interleave(self.expert_tensor_size, dim=1).flatten()
        copy_of_sent_L = torch.argsort(destination_L, stable=True)
        sent_of_copy_L = torch.empty_like(copy_of_sent_L)
        sent_of_copy_L[copy_of_sent_L] = torch.arange(len(copy_of_sent_L), device=x_TD.device)
        pending_counts = self.begin_counts(destination_L, local_experts)
        token_of_sent_L = copy_of_sent_L // (routing.indices_TA.shape[1] * self.expert_tensor_size)
        rows_LD = permute_rows(x_TD, token_of_sent_L, sent_of_copy_L, self.local.choice)

        def exchange_rows() -> _DispatchState:
            received_Re, send, receive = pending_counts()
            rows_MD = all_to_all_tokens(rows_LD, send, receive, self.axis)
            weights_M = all_to_all_tokens(weights_L[copy_of_sent_L], send, receive, self.axis)
            expert_R_e = torch.arange(local_experts, device=x_TD.device).repeat(self.axis.size)
            expert_M = expert_R_e.repeat_interleave(received_Re.flatten(), output_size=sum(receive))
            # A dummy row of weight 0, so that a rank without rows runs the same matmuls.
            rows_MD, weights_M = F.pad(rows_MD, (0, 0, 0, 1)), F.pad(weights_M, (0, 1))
            expert_M = F.pad(expert_M, (0, 1))
            received = Routing(expert_M[:, None], weights_M[:, None], routing.scores_TE)
            local = self.local.dispatch(rows_MD, received, local_experts)
            return _DispatchState(
                **vars(local),
                send=send,
                receive=receive,
                token_of_sent_L=token_of_sent_L,
                sent_of_copy_L=sent_of_copy_L,
                num_received_rows=len(rows_MD),
            )

        return exchange_rows

    def begin_counts(self, destination_L: Tensor, local_experts: int) -> Callable[[], Counts]:
        """Sends every rank the numbers of rows that its experts will receive."""
        num_destinations = self.axis.size * local_experts
        count_Re = count_each(destination_L, num_destinations).view(-1, local_experts)
        ones = [1] * self.axis.size
        received_Re = all_to_all(count_Re, ones, ones, self.axis)
        pending_sizes = _to_host(torch.stack([count_Re.sum(1), received_Re.sum(1)]))

        def counts() -> Counts:
            send, receive = pending_sizes()
            return received_Re, send, receive

        return counts

    def combine(self, y_PD: Tensor, dispatched: Dispatched, num_tokens: int) -> Tensor:
        """Sends the experts' outputs back to their tokens' ranks and sums each token's, [T, D]."""
        assert isinstance(dispatched, _DispatchState)
        rows_MD = self.local.combine(y_PD, dispatched, dispatched.num_received_rows)[:-1]
        back_LD = all_to_all_tokens(rows_MD, dispatched.receive, dispatched.send, self.axis)
        return unpermute_rows(
            back_LD,
            dispatched.token_of_sent_L,
            dispatched.sent_of_copy_L,
            num_tokens,
            self.local.choice,
        )

    def _destinations(self, indices_TA: Tensor, local_experts: int) -> Tensor:
        """Returns rank · e + local expert, of every expert-tensor shard of each selected expert."""
        owner_TA, expert_TA = indices_TA // local_experts, indices_TA % local_experts
        shard = torch.arange(self.expert_tensor_size, device=indices_TA.device)
        rank = owner_TA[..., None] * self.expert_tensor_size + shard
        return (rank * local_experts + expert_TA[..., None]).flatten(1)


def _to_host(numbers: Tensor) -> Callable[[], list[list[int]]]:
    """Starts a copy to the host; the result waits for it, and for nothing that was launched later.

    On a CPU the numbers are read at once.
    """
    if not numbers.is_cuda:
        read = numbers.tolist()
        return lambda: read
    copy = torch.empty_like(numbers, device="cpu", pin_memory=True)
    copy.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[list[int]]:
        copied.synchronize()
        return copy.tolist()

    return wait
