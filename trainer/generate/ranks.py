"""Ranks that share a model while it generates: tensor and expert ranks, as in training.

Every rank has all tokens of the sequences. Tensor ranks hold some heads and a part of the
vocabulary; expert ranks exchange the rows of their experts.

Letters: T tokens, v vocabulary of a rank, V vocabulary, X any width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch.distributed as dist
from torch import Tensor

from model import ModelConfig
from model.exchange import Exchange, LocalExchange
from trainer.config import ConfigError, ParallelConfig
from trainer.parallel.collectives import all_gather, all_gather_objects, all_reduce_
from trainer.parallel.grid import Degrees, Grid

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """How ranks compute the same tokens; without a grid it is one rank.

    Attributes:
        divides_data: whether each data rank has sequences of its own, which `may_divide_data`
            allows; by default all ranks have the same.
    """

    grid: Grid | None = None
    divides_data: bool = False

    @property
    def exchange(self) -> Exchange:
        return LocalExchange() if self.grid is None else ReplicatedExchange(self.grid)

    def gather_logits(self, logits_Tv: Tensor) -> Tensor:
        """Returns the logits of the whole vocabulary, [T, V]."""
        if self.grid is None or self.grid.tensor.size == 1:
            return logits_Tv
        return all_gather(logits_Tv.t(), self.grid.tensor).t()

    def from_first(self, read: Callable[[], Item]) -> Item:
        """Returns what `read` returns on the first rank, the only one that calls it."""
        if self.grid is None:
            return read()
        item = read() if self.grid.is_first else None
        result = all_gather_objects(item, self.grid.world)[0]
        return cast(Item, result)

    def agree(self, tokens: Tensor) -> Tensor:
        """Returns the first rank's tokens: rounding may differ between ranks."""
        if self.grid is not None:
            axis = self.grid.sequence if self.divides_data else self.grid.world
            if axis.group is not None:
                dist.broadcast(tokens, src=axis.ranks[0], group=axis.group)
        return tokens


ALONE = Ranks()


def may_divide_data(grid: Grid) -> bool:
    """Whether data ranks can generate on their own: their experts are not on other data ranks."""
    return {*grid.expert_all_to_all.ranks} <= {*grid.sequence.ranks}


def shared_degrees(config: ModelConfig, processes: int) -> Degrees:
    """Returns the degrees at which processes share a model.

    All of them divide the routed experts; as many of them as possible divide the rest.

    Raises:
        ConfigError: the experts do not divide among them.
    """
    for tensor in range(processes, 0, -1):
        if processes % tensor == 0:
            parallel = ParallelConfig(tensor=tensor, expert=processes)
            problems = [*parallel.problems(config)]
            if not problems:
                return parallel.degrees(processes)
    raise ConfigError(f"--nproc {processes}: {problems[0]}")


class ReplicatedExchange(LocalExchange):
    """The exchange of tensor ranks that each hold all tokens, in place of a part of them."""

    def __init__(self, grid: Grid) -> None:
        self._axis = grid.tensor

    def reduce_scatter_queries(self, partial_TX: Tensor) -> Tensor:
        """Sums the heads' partial results over tensor ranks."""
        return all_reduce_(partial_TX.contiguous(), self._axis)
