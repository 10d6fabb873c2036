"""Which shard of every logical tensor a rank holds, as a function of its name and the degrees.

Tensor ranks divide what belongs to heads, output groups, vocabulary and the shared expert's inner
dimension; expert ranks divide the experts, and expert-tensor ranks each expert's inner dimension,
as the table in model/parameters.py says. Any other tensor is whole on all ranks of its pipeline
stage. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from model.parameter_spec import Shape
from model.parameters import spec_of
from trainer.parallel.degrees import DENSE, EXPERT, Degrees, place_of

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["whole", "tensor", "expert"]


@dataclass(frozen=True)
class Placement:
    """The shard of a logical tensor that this rank holds.

    Attributes:
        kind: which axes divide the tensor.
        global_shape: the unsharded tensor's shape.
        global_offset: index of the shard's first element in the unsharded tensor.
        local_shape: the shard's shape.
        dim: the dimension that tensor ranks (expert-tensor ranks for experts) divide, or None.
        replicas: the number of ranks of the pipeline stage that hold the same shard.
    """

    kind: Kind
    global_shape: Shape
    global_offset: Shape
    local_shape: Shape
    dim: int | None
    replicas: int

    @property
    def matrix_shape(self) -> Shape:
        """The global shape, but of the experts only the local ones: each is a matrix."""
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


def split_dim(name: str) -> tuple[Kind, int | None]:
    """Returns which axes divide a parameter or buffer, and along which dimension."""
    return spec_of(name).sharded or ("whole", None)


def place(name: str, shape: Shape, degrees: Degrees, rank: int) -> Placement:
    """The shard of the tensor `name`, of the whole `shape`, that `rank` holds."""
    kind, dim = split_dim(name)
    offset, size = [0] * len(shape), list(shape)
    stage = degrees.world // degrees.pipeline

    def cut(along: int, index: int, parts: int) -> None:
        size[along] = shape[along] // parts
        offset[along] = index * size[along]

    if kind == "tensor":
        assert dim is not None
        cut(dim, place_of(rank, DENSE, degrees)["tensor"], degrees.tensor)
        stage //= degrees.tensor
        dim = dim if degrees.tensor > 1 else None
    elif kind == "expert":
        assert dim is not None
        places = place_of(rank, EXPERT, degrees)
        cut(0, places["expert"], degrees.expert)
        cut(dim, places["expert_tensor"], degrees.expert_tensor)
        stage = degrees.expert_data
        dim = dim if degrees.expert_tensor > 1 else None
    return Placement(kind, shape, tuple(offset), tuple(size), dim, stage)


def place_all(shapes: Mapping[str, Shape], degrees: Degrees, rank: int) -> dict[str, Placement]:
    """The placement of every tensor by name."""
    return {name: place(name, tuple(shape), degrees, rank) for name, shape in shapes.items()}
