"""Which shard of every logical tensor a rank holds, as a function of its name and the degrees.

Tensor ranks divide what belongs to heads, output groups, vocabulary and the shared expert's inner
dimension; expert ranks divide the experts, and expert-tensor ranks each expert's inner dimension,
as the table in model/parameters.py says. Any other tensor is replicated on all ranks of its
pipeline stage. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from model.parameter_spec import Shape
from model.parameters import spec_of
from trainer.parallel.degrees import DENSE_AXES, EXPERT_AXES, Degrees, coordinates_of

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["replicated", "tensor", "expert"]


@dataclass(frozen=True)
class Placement:
    """The shard of a logical tensor that this rank holds.

    Attributes:
        kind: which ranks shard the tensor.
        global_shape: the unsharded tensor's shape.
        global_offset: index of the shard's first element in the unsharded tensor.
        local_shape: the shard's shape.
        dim: the dimension that tensor ranks (expert-tensor ranks for experts) shard, or None.
        replicas: the number of ranks of the pipeline stage that hold the same shard.
    """

    kind: Kind
    global_shape: Shape
    global_offset: Shape
    local_shape: Shape
    dim: int | None
    replicas: int

    @property
    def table_shape(self) -> Shape:
        """The shape in the optimizer's table: the global one, of this rank's experts only."""
        if self.kind != "expert":
            return self.global_shape
        return (self.local_shape[0], *self.global_shape[1:])

    def shard(self, tensor: Tensor) -> Tensor:
        """Returns a view of this rank's shard of a tensor of the global shape."""
        ranges = zip(self.global_offset, self.local_shape, strict=True)
        for dim, (start, length) in enumerate(ranges):
            tensor = tensor.narrow(dim, start, length)
        return tensor

    def matrix_shard(self, matrix: Tensor) -> Tensor:
        """Returns a view of this rank's shard of one of the stacked matrices."""
        ranges = zip(self.global_offset[1:], self.local_shape[1:], strict=True)
        for dim, (start, length) in enumerate(ranges):
            matrix = matrix.narrow(dim, start, length)
        return matrix


def sharding_of(name: str) -> tuple[Kind, int | None]:
    """Returns which ranks shard a parameter or buffer, and along which dimension."""
    return spec_of(name).sharded or ("replicated", None)


def placement_of(name: str, shape: Shape, degrees: Degrees, rank: int) -> Placement:
    """Returns which shard of the tensor `name`, of the unsharded `shape`, `rank` holds."""
    kind, dim = sharding_of(name)
    offset, local_shape = [0] * len(shape), list(shape)
    replicas = degrees.world_size // degrees.pipeline

    def shard_dim(along: int, rank: int, num_ranks: int) -> None:
        local_shape[along] = shape[along] // num_ranks
        offset[along] = rank * local_shape[along]

    if kind == "tensor":
        assert dim is not None
        shard_dim(dim, coordinates_of(rank, DENSE_AXES, degrees)["tensor"], degrees.tensor)
        replicas //= degrees.tensor
        dim = dim if degrees.tensor > 1 else None
    elif kind == "expert":
        assert dim is not None
        coordinates = coordinates_of(rank, EXPERT_AXES, degrees)
        shard_dim(0, coordinates["expert"], degrees.expert)
        shard_dim(dim, coordinates["expert_tensor"], degrees.expert_tensor)
        replicas = degrees.expert_data
        dim = dim if degrees.expert_tensor > 1 else None
    return Placement(kind, shape, tuple(offset), tuple(local_shape), dim, replicas)


def placements_of(shapes: Mapping[str, Shape], degrees: Degrees, rank: int) -> dict[str, Placement]:
    """Returns the placement of every tensor by name."""
    return {name: placement_of(name, tuple(shape), degrees, rank) for name, shape in shapes.items()}
