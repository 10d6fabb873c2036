"""Hybrid ZeRO on a grid: the groups of `zero_layout`, with the process groups of their ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from optim import Assignment, OptimConfig, check_names
from optim.zero import CHUNK_ELEMENTS, HybridZero, ParameterGroup, Precision
from trainer.parallel.collectives import (
    Wait,
    begin_all_gather,
    begin_all_to_all,
    begin_reduce_scatter,
    sum_,
)
from trainer.parallel.grid import Axis, Grid
from trainer.parallel.placement import Placement
from trainer.parallel.zero_layout import shard_groups


@dataclass(frozen=True)
class AxisRanks:
    """The ranks of an axis, as the optimizer's `RankGroup`."""

    axis: Axis

    @property
    def rank(self) -> int:
        """This rank's index on the axis."""
        return self.axis.rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.axis.size

    def sum_(self, tensor: Tensor) -> Tensor:
        """All-reduces in place."""
        return sum_(tensor, self.axis)

    def reduce_scatter(self, tensor: Tensor) -> Wait:
        """Starts a reduce-scatter along dim 0."""
        return begin_reduce_scatter(tensor, self.axis)

    def all_gather(self, tensor: Tensor) -> Wait:
        """Starts an all-gather, which concatenates along dim 0."""
        return begin_all_gather(tensor, self.axis)

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Wait:
        """Starts an all-to-all of runs of elements, with their sizes by rank."""
        return begin_all_to_all(tensor, send, receive, self.axis)


def make_zero(
    parameters: Mapping[str, Parameter],
    placements: Mapping[str, Placement],
    table: Sequence[Assignment],
    config: OptimConfig,
    grid: Grid,
    tied: bool = False,
    seed: int = 0,
    padding: float = 0.1,
    gradients: Precision = "fp32",
    expert_gradients: Precision = "fp32",
    chunk_elements: int = CHUNK_ELEMENTS,
) -> HybridZero:
    """The optimizer of this rank's parameters. All ranks call it together.

    Args:
        tied: whether the first and the last stage both hold `embed.weight`.
        seed: of stochastic rounding.
        padding: maximum padding of a buffer, as a fraction of the elements that it holds; where it
            would be more, fewer ranks own the parameters.
        gradients, expert_gradients: the precisions that gradients are sent in.
        chunk_elements: size of one collective, over all owners.

    Raises OptimError unless the table has every parameter once and every shard suits Muon.
    """
    check_names(parameters, table)
    alone = Axis("alone", 0, (grid.rank,), None, grid.traffic)
    axes = {
        "whole": (grid.stage, alone),
        "tensor": (grid.split, grid.tensor),
        "expert": (grid.expert_data, grid.expert_tensor),
        "embedding": (grid.split, grid.tensor),
    }
    low = {name for name, parameter in parameters.items() if parameter.dtype != torch.float32}
    groups = shard_groups(table, placements, low, grid.degrees, tied, config.muon, padding)
    divided = grid.divide([(axes[group.kind][0], group.layout.owners) for group in groups])
    parameter_groups = []
    for group, (owners, replicas) in zip(groups, divided, strict=True):
        replica_axes = [replicas, grid.tied] if group.kind == "embedding" else [replicas]
        names = [local.assignment.name for local in group.local_parameters]
        dims = {name: placements[name].dim for name in names}
        parameter_groups.append(
            ParameterGroup(
                {name: parameters[name] for name in names},
                group.local_parameters,
                group.layout,
                owners=AxisRanks(owners),
                shard_ranks=AxisRanks(axes[group.kind][1]),
                replicas=[AxisRanks(axis) for axis in replica_axes if axis.size > 1],
                split_dim={name: dim for name, dim in dims.items() if dim is not None},
                precision=expert_gradients if group.kind == "expert" else gradients,
            )
        )
    return HybridZero(parameter_groups, config, seed, chunk_elements)
