"""What hybrid ZeRO is given (parameters held by the same ranks) and the states that it returns.

Process groups are a protocol here; `trainer.parallel.optimizer_sharding` implements it on a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor
from torch.nn import Parameter

from optim.errors import OptimError
from optim.zero.plan import Layout, LocalParameter

Precision = Literal["fp32", "bf16", "bf16_stochastic"]
"""What gradients are sent in; `bf16_stochastic` rounds them stochastically."""
Pending = Callable[[], Tensor]
"""Waits for a collective that has started, and returns its result."""


class RankGroup(Protocol):
    """Ranks that exchange tensors. With one rank the result of every method is its input."""

    @property
    def rank(self) -> int:
        """This rank's index in the group."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """All-reduces in place."""

    def reduce_scatter(self, tensor: Tensor) -> Pending:
        """Starts a reduce-scatter along dim 0."""

    def all_gather(self, tensor: Tensor) -> Pending:
        """Starts an all-gather, which concatenates along dim 0."""

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Pending:
        """Starts an all-to-all of runs of send[r] elements to rank r and receive[r] from it."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one dtype that the same ranks hold (not a group that settings name).

    Attributes:
        parameters: by name, with the shapes in `local_parameters`.
        local_parameters: in an order that all ranks share.
        layout: who owns which part of them.
        owners: the ranks that hold the same shards and own them together.
        shard_ranks: the ranks that hold the other shards of the same matrices.
        replica_groups: groups of ranks that own the same partition as this rank: one rank from each
            set of owners, and for a replicated embedding the other end of the pipeline. Gradients
            are summed over them as well, and each rank makes the same update.
        shard_dim: by name of a sharded parameter, the dimension that `shard_ranks` split.
        precision: what gradients are sent in.
    """

    parameters: Mapping[str, Parameter]
    local_parameters: Sequence[LocalParameter]
    layout: Layout
    owners: RankGroup
    shard_ranks: RankGroup
    replica_groups: Sequence[RankGroup] = ()
    shard_dim: Mapping[str, int] | None = None
    precision: Precision = "fp32"


@dataclass(frozen=True)
class StateSlice:
    """A state, or the gradient, of contiguous elements of a parameter.

    Attributes:
        kind: `master`, `momentum`, `exp_avg`, `exp_avg_sq`, `step` (one number) or `gradient`.
        name: of the parameter.
        tensor: the live state.
        start: index of its first element in the flattened local parameter; where `is_gathered`, in
            the flattened unsharded matrices.
        is_gathered: whether it covers unsharded matrices, of which the parameter is a shard.
    """

    kind: str
    name: str
    tensor: Tensor
    start: int = 0
    is_gathered: bool = False


def check(group: ParameterGroup) -> None:
    """Raises OptimError unless all parameters have one dtype and a LocalParameter each."""
    names = {p.assignment.name for p in group.local_parameters}
    if names != set(group.parameters):
        unmatched = sorted(names ^ set(group.parameters))
        raise OptimError(
            f"these parameters are in a group or in its table, but not in both: {unmatched[:5]}"
        )
    if len({parameter.dtype for parameter in group.parameters.values()}) > 1:
        raise OptimError("a group of parameters has several precisions; each needs its own group")
