"""What the optimizer knows of a parameter that several ranks split."""

from typing import Protocol

from torch import Tensor


class Shard(Protocol):
    """One parameter's split into equal parts along one dimension.

    Both methods take tensors with the parameter's dimensions. Experts may be fewer than the
    parameter has, since their dimension is not the split one.
    """

    def gather(self, local: Tensor) -> Tensor:
        """The whole tensor from every rank's part; all ranks that split it call this together."""

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, as a view."""
