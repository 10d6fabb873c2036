"""Hybrid ZeRO on a grid: which ranks own which parameters together, and how they exchange them.

Weights that every rank of a stage holds are owned over the stage, those that tensor ranks split
over the ranks with the same part, experts over the ranks with the same experts. The embedding is
summed over the first and the last stage besides, where both hold it; each stage has owners of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from optim import Assignment, OptimConfig
from optim.errors import OptimError
from optim.hybrid_zero import Group, HybridZero, Precision
from optim.zero_plan import Held
from trainer.parallel.collectives import all_gather, all_to_all, reduce_scatter, sum_
from trainer.parallel.grid import Axis, Grid
from trainer.parallel.placement import Placement

KINDS = ("whole", "tensor", "expert", "embedding")
"""The groups in the order that every rank takes them in, fp32 parameters first in each."""


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

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """This rank's share along dim 0 of the sum."""
        return reduce_scatter(tensor, self.axis)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """All tensors behind each other."""
        return all_gather(tensor, self.axis)

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Elements to their ranks."""
        return all_to_all(tensor, send, receive, self.axis)


def held_of(entry: Assignment, placement: Placement) -> Held:
    """How a rank with this placement holds a parameter.

    Raises OptimError where ranks split a parameter of several matrices, but not between them.
    """
    local = placement.size
    if entry.matrices is None or placement.dim is None:
        return Held(entry, local)
    count, rows, columns = entry.matrices
    if placement.kind == "expert":
        return Held(entry, local, joined=True)
    if local[1] == columns and local[0] % rows == 0:  # between matrices: nothing to join
        return Held(entry, local)
    if count > 1:
        raise OptimError(
            f"parameter '{entry.name}' is {count} matrices of {rows} rows, and a rank holds "
            f"{list(local)} of {list(entry.shape)}; ranks must split it between matrices"
        )
    return Held(entry, local, joined=True)


def make_zero(
    parameters: Mapping[str, Parameter],
    placements: Mapping[str, Placement],
    table: Sequence[Assignment],
    config: OptimConfig,
    grid: Grid,
    tied: bool = False,
    seed: int = 0,
    gradients: Precision = "fp32",
    expert_gradients: Precision = "fp32",
) -> HybridZero:
    """The optimizer of this rank's parameters; all ranks call it together.

    `tied` says that the first and the last stage both hold `embed.weight`. `gradients` and
    `expert_gradients` are the precisions that they are sent in. Raises OptimError where a split
    does not fit the optimizer.
    """
    alone = Axis("alone", 0, (grid.rank,), None, grid.traffic)
    axes = {
        "whole": (grid.stage, alone),
        "tensor": (grid.split, grid.tensor),
        "expert": (grid.expert_data, grid.expert_tensor),
        "embedding": (grid.split, grid.tensor),
    }
    groups = []
    for kind in KINDS:
        owners, homes = map(AxisRanks, axes[kind])
        for low in (False, True):
            held = [
                held_of(entry, placements[entry.name])
                for entry in table
                if _kind(entry.name, placements, tied) == kind
                and (parameters[entry.name].dtype != torch.float32) == low
            ]
            names = [line.entry.name for line in held]
            dims = {line.entry.name: placements[line.entry.name].dim for line in held}
            groups.append(
                Group(
                    {name: parameters[name] for name in names},
                    held,
                    owners,
                    homes,
                    AxisRanks(grid.tied) if kind == "embedding" else None,
                    {name: dim for name, dim in dims.items() if dim is not None},
                    expert_gradients if kind == "expert" else gradients,
                )
            )
    return HybridZero(groups, config, seed)


def _kind(name: str, placements: Mapping[str, Placement], tied: bool) -> str:
    return "embedding" if tied and name == "embed.weight" else placements[name].kind
