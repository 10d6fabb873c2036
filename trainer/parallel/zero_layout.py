"""Which ranks share the ownership of which parameters, from names and degrees alone. No torch.

Parameters that every rank of a pipeline stage holds are owned over the stage; those that
tensor-parallel ranks shard, over the ranks with the same shard; experts, over the ranks with the
same experts. Where the first and the last stage both hold the embedding, its gradients are also
summed over the two, and each stage has owners of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from optim import Assignment, MuonConfig, OptimError
from optim.zero import Layout, Load, LocalParameter, loads_of, plan_owners
from trainer.parallel.degrees import DENSE, EXPERT, Degrees, place_of
from trainer.parallel.placement import Placement

GroupKind = Literal["whole", "tensor", "expert", "embedding"]
KINDS: tuple[GroupKind, ...] = ("whole", "tensor", "expert", "embedding")
"""The order of the groups on every rank, fp32 parameters before lower precision in each."""


@dataclass(frozen=True)
class ShardGroup:
    """Parameters of one precision that the same ranks hold, and who owns which part of them.

    Attributes:
        is_low: whether their precision is lower than fp32.
        ranks: number of ranks that hold the same shard; every `layout.owners` consecutive ones of
            them own it together.
    """

    kind: GroupKind
    is_low: bool
    local_parameters: tuple[LocalParameter, ...]
    ranks: int
    layout: Layout

    @property
    def replicas(self) -> int:
        """How many times the same update is made."""
        return self.ranks // self.layout.owners


def shard_groups(
    table: Sequence[Assignment],
    placements: Mapping[str, Placement],
    low: Collection[str],
    degrees: Degrees,
    tied: bool,
    muon: MuonConfig,
    padding: float,
) -> list[ShardGroup]:
    """Groups a rank's parameters, all of whose names are in `table`. No group is empty.

    Args:
        low: names of parameters of lower precision than fp32.
        tied: whether the first and the last stage both hold `embed.weight`.
        padding: maximum padding of a buffer, as a fraction of the elements that it holds.

    Raises OptimError where ranks shard a parameter of several matrices, but not between them.
    """
    stage = degrees.world // degrees.pipeline
    ranks = {
        "whole": (stage, 1),
        "tensor": (stage // degrees.tensor, degrees.tensor),
        "expert": (degrees.expert_data, degrees.expert_tensor),
        "embedding": (stage // degrees.tensor, degrees.tensor),
    }
    groups = []
    for kind in KINDS:
        same_shard, assembly_ranks = ranks[kind]
        for is_low in (False, True):
            parameters = tuple(
                local_parameter(entry, placements[entry.name])
                for entry in table
                if _kind(entry.name, placements, tied) == kind and (entry.name in low) == is_low
            )
            if parameters:
                layout = plan_owners(parameters, same_shard, assembly_ranks, muon, padding)
                groups.append(ShardGroup(kind, is_low, parameters, same_shard, layout))
    return groups


def local_parameter(entry: Assignment, placement: Placement) -> LocalParameter:
    """How a rank with this placement holds a parameter.

    Raises OptimError where ranks shard a parameter of several matrices, but not between them.
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
            f"{list(shape)} of {list(entry.shape)}; ranks must split it between matrices"
        )
    return LocalParameter(entry, shape, is_sharded=True)


def _kind(name: str, placements: Mapping[str, Placement], tied: bool) -> GroupKind:
    return "embedding" if tied and name == "embed.weight" else placements[name].kind


def group_ranks(degrees: Degrees, rank: int) -> dict[GroupKind, tuple[int, int]]:
    """By kind, a rank's index among those with the same shard, and among those that shard."""
    dense, expert = place_of(rank, DENSE, degrees), place_of(rank, EXPERT, degrees)
    split = dense["data"] * degrees.context + dense["context"]
    return {
        "whole": (split * degrees.tensor + dense["tensor"], 0),
        "tensor": (split, dense["tensor"]),
        "expert": (expert["expert_data"], expert["expert_tensor"]),
        "embedding": (split, dense["tensor"]),
    }


def stage_loads(
    groups: Sequence[ShardGroup], degrees: Degrees, pipeline: int, muon: MuonConfig
) -> list[dict[tuple[GroupKind, bool], Load]]:
    """By rank of a pipeline stage, what it keeps and computes of each group."""
    group_loads = {(g.kind, g.is_low): (g, loads_of(g.layout, muon)) for g in groups}
    stage = degrees.world // degrees.pipeline
    by_rank = []
    for rank in range(pipeline * stage, (pipeline + 1) * stage):
        indices = group_ranks(degrees, rank)
        loads = {}
        for key, (group, by_owner) in group_loads.items():
            index, assembly_rank = indices[group.kind]
            loads[key] = by_owner[index % group.layout.owners][assembly_rank]
        by_rank.append(loads)
    return by_rank
