"""Which ranks own which parameters together, from names and degrees alone. Imports no torch.

Weights that every rank of a stage holds are owned over the stage, those that tensor ranks split
over the ranks with the same part, experts over the ranks with the same experts. The embedding is
summed over the first and the last stage besides, where both hold it; each stage has owners of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from optim.config import MuonConfig
from optim.errors import OptimError
from optim.partition import Assignment
from optim.zero.plan import Held, Layout, Load, loads_of, plan_owners
from trainer.parallel.degrees import DENSE, EXPERT, Degrees, place_of
from trainer.parallel.placement import Placement

FamilyKind = Literal["whole", "tensor", "expert", "embedding"]
KINDS: tuple[FamilyKind, ...] = ("whole", "tensor", "expert", "embedding")
"""The families in the order that every rank takes them in, fp32 parameters first in each."""


@dataclass(frozen=True)
class Family:
    """Parameters of one precision that the same ranks hold, and who owns what of them.

    Attributes:
        is_low: whether they are of lower precision than fp32.
        ranks: how many hold the same part; runs of `layout.owners` of them own it together.
    """

    kind: FamilyKind
    is_low: bool
    held: tuple[Held, ...]
    ranks: int
    layout: Layout

    @property
    def repeats(self) -> int:
        """How many times the same update is made."""
        return self.ranks // self.layout.owners


def families(
    table: Sequence[Assignment],
    placements: Mapping[str, Placement],
    low: Collection[str],
    degrees: Degrees,
    tied: bool,
    muon: MuonConfig,
    padding: float,
) -> list[Family]:
    """The families of a rank's parameters, all of whose names are in `table`; none is empty.

    Args:
        low: names of parameters of lower precision than fp32.
        tied: whether the first and the last stage both hold `embed.weight`.
        padding: most of it in a buffer, over what the buffer holds.

    Raises OptimError where ranks split a parameter of several matrices, but not between them.
    """
    stage = degrees.world // degrees.pipeline
    ranks = {
        "whole": (stage, 1),
        "tensor": (stage // degrees.tensor, degrees.tensor),
        "expert": (degrees.expert_data, degrees.expert_tensor),
        "embedding": (stage // degrees.tensor, degrees.tensor),
    }
    found = []
    for kind in KINDS:
        owners, homes = ranks[kind]
        for is_low in (False, True):
            held = tuple(
                held_of(entry, placements[entry.name])
                for entry in table
                if _kind(entry.name, placements, tied) == kind and (entry.name in low) == is_low
            )
            if held:
                layout = plan_owners(held, owners, homes, muon, padding)
                found.append(Family(kind, is_low, held, owners, layout))
    return found


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


def _kind(name: str, placements: Mapping[str, Placement], tied: bool) -> FamilyKind:
    return "embedding" if tied and name == "embed.weight" else placements[name].kind


def seats(degrees: Degrees, rank: int) -> dict[FamilyKind, tuple[int, int]]:
    """A rank's number among those that hold the same part, and among those that split it."""
    dense, expert = place_of(rank, DENSE, degrees), place_of(rank, EXPERT, degrees)
    split = dense["data"] * degrees.context + dense["context"]
    return {
        "whole": (split * degrees.tensor + dense["tensor"], 0),
        "tensor": (split, dense["tensor"]),
        "expert": (expert["expert_data"], expert["expert_tensor"]),
        "embedding": (split, dense["tensor"]),
    }


def stage_loads(
    some: Sequence[Family], degrees: Degrees, pipeline: int, muon: MuonConfig
) -> list[dict[tuple[FamilyKind, bool], Load]]:
    """By rank of a stage, what it keeps and computes of each family."""
    loads = {(f.kind, f.is_low): (f, loads_of(f.layout, muon)) for f in some}
    stage = degrees.world // degrees.pipeline
    found = []
    for rank in range(pipeline * stage, (pipeline + 1) * stage):
        places = seats(degrees, rank)
        mine = {}
        for key, (family, by_owner) in loads.items():
            number, home = places[family.kind]
            mine[key] = by_owner[number % family.layout.owners][home]
        found.append(mine)
    return found
