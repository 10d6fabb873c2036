"""Hybrid ZeRO on a grid: the families of `zero_layout` with the ranks that exchange them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from optim import Assignment, OptimConfig
from optim.optimizer import check_names
from optim.zero.group import Group, Precision
from optim.zero.hybrid_zero import CHUNK_ELEMENTS, HybridZero
from trainer.parallel.collectives import (
    Wait,
    begin_all_gather,
    begin_all_to_all,
    begin_reduce_scatter,
    sum_,
)
from trainer.parallel.grid import Axis, Grid
from trainer.parallel.placement import Placement
from trainer.parallel.zero_layout import families


@dataclass(frozen=True)
class AxisRanks:
    """The ranks of an axis, for the optimizer."""

    axis: Axis

    @property
    def rank(self) -> int:
        """This rank's number on the axis."""
        return self.axis.rank

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.axis.size

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over the axis, in place."""
        return sum_(tensor, self.axis)

    def reduce_scatter(self, tensor: Tensor) -> Wait:
        """This rank's share along dim 0 of the sum."""
        return begin_reduce_scatter(tensor, self.axis)

    def all_gather(self, tensor: Tensor) -> Wait:
        """All tensors behind each other."""
        return begin_all_gather(tensor, self.axis)

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Wait:
        """Elements to their ranks."""
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
    """The optimizer of this rank's parameters; all ranks call it together.

    `tied` says that the first and the last stage both hold `embed.weight`. `padding` is the most in
    a buffer over what it holds: where it would be more, fewer ranks own the parameters.
    `gradients` and `expert_gradients` are the precisions that they are sent in. Raises OptimError
    where the table does not have every parameter once, or a split does not fit the optimizer.
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
    found = families(table, placements, low, grid.degrees, tied, config.muon, padding)
    divided = grid.divide([(axes[f.kind][0], f.layout.owners) for f in found])
    groups = []
    for family, (owners, repeats) in zip(found, divided, strict=True):
        homes = axes[family.kind][1]
        others = [repeats, grid.tied] if family.kind == "embedding" else [repeats]
        names = [line.entry.name for line in family.held]
        dims = {name: placements[name].dim for name in names}
        groups.append(
            Group(
                {name: parameters[name] for name in names},
                family.held,
                family.layout,
                AxisRanks(owners),
                AxisRanks(homes),
                [AxisRanks(axis) for axis in others if axis.size > 1],
                {name: dim for name, dim in dims.items() if dim is not None},
                expert_gradients if family.kind == "expert" else gradients,
            )
        )
    return HybridZero(groups, config, seed, chunk_elements)
