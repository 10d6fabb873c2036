"""Hybrid ZeRO on a grid: the groups of `zero_layout`, with the process groups of their ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from optim import Assignment, OptimConfig, check_names
from optim.syrk import Syrk, syrk_
from optim.zero import CHUNK_ELEMENTS, HybridZero, ParameterGroup, Precision
from trainer.parallel.collectives import (
    Pending,
    all_reduce_,
    begin_all_gather,
    begin_all_to_all,
    begin_reduce_scatter,
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

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """All-reduces in place."""
        return all_reduce_(tensor, self.axis)

    def reduce_scatter(self, tensor: Tensor) -> Pending:
        """Starts a reduce-scatter along dim 0."""
        return begin_reduce_scatter(tensor, self.axis)

    def all_gather(self, tensor: Tensor) -> Pending:
        """Starts an all-gather, which concatenates along dim 0."""
        return begin_all_gather(tensor, self.axis)

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Pending:
        """Starts an all-to-all of contiguous elements, with sizes per rank."""
        return begin_all_to_all(tensor, send, receive, self.axis)


def build_hybrid_zero(
    parameters: Mapping[str, Parameter],
    placements: Mapping[str, Placement],
    table: Sequence[Assignment],
    config: OptimConfig,
    grid: Grid,
    embedding_is_replicated: bool = False,
    seed: int = 0,
    max_padding: float = 0.1,
    grad_reduce_dtype: Precision = "fp32",
    expert_grad_reduce_dtype: Precision = "fp32",
    chunk_elements: int = CHUNK_ELEMENTS,
    syrk: Syrk = syrk_,
) -> HybridZero:
    """Returns the optimizer of this rank's parameters. All ranks call it together.

    Args:
        embedding_is_replicated: whether first and last pipeline rank both hold `embed.weight`.
        seed: of stochastic rounding.
        max_padding: maximum padding of a flat buffer, as a fraction of the elements that it holds;
            if exceeded, fewer ranks own the parameters and the rest are replicas.
        grad_reduce_dtype, expert_grad_reduce_dtype: the precisions that gradients are sent in.
        chunk_elements: size of one collective, over all owners.
        syrk: computes the symmetric matmuls of Newton–Schulz.

    Raises OptimError if a parameter is missing from or duplicated in the table, or a shard boundary
    falls inside one of a parameter's several Muon matrices.
    """
    check_names(parameters, table)
    trivial = Axis("trivial", 0, (grid.rank,), None, grid.traffic)
    axes = {
        "replicated": (grid.stage, trivial),
        "tensor": (grid.tensor_replicas, grid.tensor),
        "expert": (grid.expert_data, grid.expert_tensor),
        "embedding": (grid.tensor_replicas, grid.tensor),
    }
    low_precision = {
        name for name, parameter in parameters.items() if parameter.dtype != torch.float32
    }
    groups = shard_groups(
        table,
        placements,
        low_precision,
        grid.degrees,
        embedding_is_replicated,
        config.muon,
        max_padding,
    )
    divided = grid.divide([(axes[group.kind][0], group.layout.owners) for group in groups])
    parameter_groups = []
    for group, (owners, replicas) in zip(groups, divided, strict=True):
        replica_axes = [replicas, grid.embedding] if group.kind == "embedding" else [replicas]
        names = [local.assignment.name for local in group.local_parameters]
        dims = {name: placements[name].dim for name in names}
        parameter_groups.append(
            ParameterGroup(
                {name: parameters[name] for name in names},
                group.local_parameters,
                group.layout,
                owners=AxisRanks(owners),
                shard_ranks=AxisRanks(axes[group.kind][1]),
                replica_groups=[AxisRanks(axis) for axis in replica_axes if axis.size > 1],
                shard_dim={name: dim for name, dim in dims.items() if dim is not None},
                precision=expert_grad_reduce_dtype if group.kind == "expert" else grad_reduce_dtype,
            )
        )
    return HybridZero(parameter_groups, config, seed, chunk_elements, syrk)
