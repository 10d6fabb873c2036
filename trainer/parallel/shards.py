"""Split parameters for the optimizer: how a part becomes the whole, and the whole a part."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from trainer.parallel.collectives import all_gather
from trainer.parallel.grid import Axis, Grid
from trainer.parallel.placement import Placement


@dataclass(frozen=True)
class TensorShard:
    """The part that this rank holds of a tensor whose dimension `placement.dim` the axis splits.

    Only that dimension matters here: a stack of experts keeps the experts that are local.
    """

    placement: Placement
    axis: Axis

    def gather(self, local: Tensor) -> Tensor:
        """The parts of all ranks of the axis behind each other along the split dimension."""
        return all_gather(local.movedim(self._dim, 0), self.axis).movedim(0, self._dim)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part of what `gather` gives, as a view."""
        return whole.narrow(self._dim, self.placement.offset[self._dim], self._size)

    @property
    def _dim(self) -> int:
        assert self.placement.dim is not None, "nothing splits this tensor"
        return self.placement.dim

    @property
    def _size(self) -> int:
        return self.placement.size[self._dim]


def shards_of(placements: Mapping[str, Placement], grid: Grid) -> dict[str, TensorShard]:
    """The shards of those tensors, by name, that tensor or expert-tensor ranks split."""
    axes = {"tensor": grid.tensor, "expert": grid.expert_tensor}
    return {
        name: TensorShard(placement, axes[placement.kind])
        for name, placement in placements.items()
        if placement.dim is not None
    }
