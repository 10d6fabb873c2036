"""Ranks that share a model while it generates: tensor and expert ranks, as in training.

Every rank has all tokens of the sequences. Tensor ranks hold some heads and a part of the
vocabulary; expert ranks exchange the rows of their experts.

Letters: T tokens, v vocabulary of a rank, V vocabulary, X any width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from model.exchange import Exchange, LocalExchange
from trainer.parallel.collectives import all_gather, all_reduce_
from trainer.parallel.grid import Grid


@dataclass(frozen=True)
class Ranks:
    """How ranks compute the same tokens; without a grid it is one rank."""

    grid: Grid | None = None

    @property
    def exchange(self) -> Exchange:
        return LocalExchange() if self.grid is None else ReplicatedExchange(self.grid)

    def gather_logits(self, logits_Tv: Tensor) -> Tensor:
        """Returns the logits of the whole vocabulary, [T, V]."""
        if self.grid is None or self.grid.tensor.size == 1:
            return logits_Tv
        return all_gather(logits_Tv.t(), self.grid.tensor).t()

    def agree(self, tokens: Tensor) -> Tensor:
        """Returns the first rank's tokens: rounding may differ between ranks."""
        if self.grid is not None and self.grid.world.group is not None:
            dist.broadcast(tokens, src=0, group=self.grid.world.group)
        return tokens


ALONE = Ranks()


class ReplicatedExchange(LocalExchange):
    """The exchange of tensor ranks that each hold all tokens, in place of a part of them."""

    def __init__(self, grid: Grid) -> None:
        self._axis = grid.tensor

    def reduce_scatter_queries(self, partial_TX: Tensor) -> Tensor:
        """Sums the heads' partial results over tensor ranks."""
        return all_reduce_(partial_TX.contiguous(), self._axis)
