"""Degrees of parallelism and the coordinates of ranks. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# The first name varies fastest from rank to rank.
DENSE = ("tensor", "context", "data", "pipeline")
EXPERT = ("expert_tensor", "expert", "expert_data", "pipeline")


@dataclass(frozen=True)
class Degrees:
    """The degree of every axis; `data` and `expert_data` follow from the number of processes.

    Raises:
        ValueError: a product of degrees does not divide the world. A run's config is checked first.
    """

    world: int
    tensor: int = 1
    expert: int = 1
    pipeline: int = 1
    context: int = 1
    expert_tensor: int = 1

    def __post_init__(self) -> None:
        for product in (self.tensor * self.context, self.expert_tensor * self.expert):
            if self.world % (product * self.pipeline):
                raise ValueError(f"{self} does not divide the world")

    @property
    def data(self) -> int:
        """Ranks that share a global batch's rows."""
        return self.world // (self.tensor * self.context * self.pipeline)

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts."""
        return self.world // (self.expert_tensor * self.expert * self.pipeline)

    def of(self, names: Sequence[str]) -> list[int]:
        """Degrees of the named axes."""
        return [getattr(self, name) for name in names]


def place_of(rank: int, names: Sequence[str], degrees: Degrees) -> dict[str, int]:
    """The coordinates of a rank in the mesh with these axes, without any process group."""
    places = {}
    for name, size in zip(names, degrees.of(names), strict=True):
        rank, places[name] = divmod(rank, size)
    return places
