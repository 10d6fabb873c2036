"""Decides, from names and degrees alone, which ranks own which parameters. Imports no torch.

Parameters that every rank of a pipeline stage holds are owned over the stage; those that
tensor-parallel ranks shard, over the ranks with the same shard; experts, over the ranks with the
same experts. Where the first and the last pipeline rank both hold the embedding, its gradients
are also summed over the two, and each has owners of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from optim import Assignment, MuonConfig, OptimError
from optim.zero import Layout, Load, LocalParameter, loads_of, plan_owners
from trainer.parallel.degrees import DENSE_AXES, EXPERT_AXES, Degrees, coordinates_of
from trainer.parallel.placement import Placement

GroupKind = Literal["replicated", "tensor", "expert", "embedding"]
KINDS: tuple[GroupKind, ...] = ("replicated", "tensor", "expert", "embedding")
"""The order of the groups on every rank, fp32 parameters before lower precision in each."""


@dataclass(frozen=True)
class ShardGroup:
    """Parameters of one precision that the same ranks hold, and who owns which part of them.

    Attributes:
        is_low_precision: whether their precision is lower than fp32.
        num_ranks: number of ranks that hold the same shard. They form groups of `layout.owners`
            consecutive ranks; the ranks of each group own all of the shard together.
    """

    kind: GroupKind
    is_low_precision: bool
    local_parameters: tuple[LocalParameter, ...]
    num_ranks: int
    layout: Layout

    @property
    def replicas(self) -> int:
        """Number of groups of owners; each computes the same update."""
        return self.num_ranks // self.layout.owners


def shard_groups(
    table: Sequence[Assignment],
    placements: Mapping[str, Placement],
    low_precision: Collection[str],
    degrees: Degrees,
    embedding_is_replicated: bool,
    muon: MuonConfig,
    max_padding: float,
) -> list[ShardGroup]:
    """Groups a rank's parameters, all of whose names are in `table`. No group is empty.

    Args:
        low_precision: names of parameters of lower precision than fp32.
        embedding_is_replicated: whether first and last pipeline rank both hold `embed.weight`.
        max_padding: maximum padding of a buffer, as a fraction of the elements that it holds.

    Raises OptimError if a shard boundary falls inside one of a parameter's several matrices.
    """
    stage = degrees.world_size // degrees.pipeline
    ranks = {
        "replicated": (stage, 1),
        "tensor": (stage // degrees.tensor, degrees.tensor),
        "expert": (degrees.expert_data, degrees.expert_tensor),
        "embedding": (stage // degrees.tensor, degrees.tensor),
    }
    groups = []
    for kind in KINDS:
        # The latter shard each matrix (optim/zero/plan.py).
        num_ranks, num_shard_ranks = ranks[kind]
        for is_low_precision in (False, True):
            parameters = tuple(
                local_parameter(entry, placements[entry.name])
                for entry in table
                if _kind(entry.name, placements, embedding_is_replicated) == kind
                and (entry.name in low_precision) == is_low_precision
            )
            if parameters:
                layout = plan_owners(parameters, num_ranks, num_shard_ranks, muon, max_padding)
                groups.append(ShardGroup(kind, is_low_precision, parameters, num_ranks, layout))
    return groups


def local_parameter(entry: Assignment, placement: Placement) -> LocalParameter:
    """Returns a parameter as a rank with this placement holds it.

    Raises OptimError if a shard boundary falls inside one of a parameter's several matrices.
    """
    shape = placement.local_shape
    if entry.matrices is None or placement.dim is None:
        return LocalParameter(entry, shape)
    count, rows, columns = entry.matrices
    if placement.kind == "expert":
        return LocalParameter(entry, shape, is_sharded=True)
    if shape[1] == columns and shape[0] % rows == 0:  # between matrices: each is on one rank
        return LocalParameter(entry, shape)
    if count > 1:
        raise OptimError(
            f"parameter '{entry.name}' is {count} matrices of {rows} rows, and a rank holds "
            f"{list(shape)} of {list(entry.shape)}; shard boundaries must coincide with "
            "matrix boundaries"
        )
    return LocalParameter(entry, shape, is_sharded=True)


def _kind(
    name: str, placements: Mapping[str, Placement], embedding_is_replicated: bool
) -> GroupKind:
    if embedding_is_replicated and name == "embed.weight":
        return "embedding"
    return placements[name].kind


def group_ranks(degrees: Degrees, rank: int) -> dict[GroupKind, tuple[int, int]]:
    """Returns two indices of a rank for each kind of group.

    The first is among the ranks that hold the same shard, the second among those that hold the
    shards of the same matrices.
    """
    dense = coordinates_of(rank, DENSE_AXES, degrees)
    expert = coordinates_of(rank, EXPERT_AXES, degrees)
    replica = dense["data"] * degrees.context + dense["context"]
    return {
        "replicated": (replica * degrees.tensor + dense["tensor"], 0),
        "tensor": (replica, dense["tensor"]),
        "expert": (expert["expert_data"], expert["expert_tensor"]),
        "embedding": (replica, dense["tensor"]),
    }


def stage_loads(
    groups: Sequence[ShardGroup], degrees: Degrees, pipeline: int, muon: MuonConfig
) -> list[dict[tuple[GroupKind, bool], Load]]:
    """Returns, for every rank of a pipeline stage, its load (memory and FLOPs) from each group."""
    group_loads = {(g.kind, g.is_low_precision): (g, loads_of(g.layout, muon)) for g in groups}
    stage = degrees.world_size // degrees.pipeline
    by_rank = []
    for rank in range(pipeline * stage, (pipeline + 1) * stage):
        indices = group_ranks(degrees, rank)
        loads = {}
        for key, (group, by_owner) in group_loads.items():
            index, assembly_rank = indices[group.kind]
            loads[key] = by_owner[index % group.layout.owners][assembly_rank]
        by_rank.append(loads)
    return by_rank
