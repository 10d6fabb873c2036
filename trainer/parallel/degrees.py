"""Degrees of parallelism and the coordinates of ranks. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# The first name varies fastest from rank to rank.
DENSE_AXES = ("tensor", "context", "data", "pipeline")
EXPERT_AXES = ("expert_tensor", "expert", "expert_data", "pipeline")


@dataclass(frozen=True)
class Degrees:
    """The degree of every axis; `data` and `expert_data` follow from the number of processes.

    Raises:
        ValueError: a product of degrees does not divide the world size. Config validation reports
            this earlier.
    """

    world_size: int
    tensor: int = 1
    expert: int = 1
    pipeline: int = 1
    context: int = 1
    expert_tensor: int = 1

    def __post_init__(self) -> None:
        for product in (self.tensor * self.context, self.expert_tensor * self.expert):
            if self.world_size % (product * self.pipeline):
                raise ValueError(
                    f"world size {self.world_size} is not a multiple of "
                    f"{product * self.pipeline}: {self}"
                )

    @property
    def data(self) -> int:
        """Number of data-parallel ranks, among which a global batch's rows are divided."""
        return self.world_size // (self.tensor * self.context * self.pipeline)

    @property
    def expert_data(self) -> int:
        """Number of ranks that hold the same experts."""
        return self.world_size // (self.expert_tensor * self.expert * self.pipeline)

    @property
    def text(self) -> str:
        """The degrees for messages, as `tensor 2 x context 1 x data 4 x pipeline 1, expert 2`."""
        axes = (DENSE_AXES, EXPERT_AXES[:-1])
        return ", ".join(" x ".join(f"{n} {getattr(self, n)}" for n in names) for names in axes)

    def of(self, names: Sequence[str]) -> list[int]:
        """Returns the degrees of the named axes."""
        return [getattr(self, name) for name in names]


def coordinates_of(rank: int, names: Sequence[str], degrees: Degrees) -> dict[str, int]:
    """Returns a rank's coordinates in the mesh of these axes, without any process group."""
    coordinates = {}
    for name, size in zip(names, degrees.of(names), strict=True):
        rank, coordinates[name] = divmod(rank, size)
    return coordinates
