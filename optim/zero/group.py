"""What hybrid ZeRO is given, parameters that the same ranks hold, and the states that it gives.

The ranks are a protocol: `trainer.parallel.optimizer_sharding` has them over a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor
from torch.nn import Parameter

from optim.errors import OptimError
from optim.zero.plan import Held, Layout

Precision = Literal["fp32", "bf16", "bf16_stochastic"]
Wait = Callable[[], Tensor]
"""What a collective that has begun gives when it is called."""


class Ranks(Protocol):
    """Ranks that exchange tensors; over one rank every method gives what it is given."""

    @property
    def rank(self) -> int:
        """This rank's number among them."""

    @property
    def size(self) -> int:
        """How many there are."""

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all, in place."""

    def reduce_scatter(self, tensor: Tensor) -> Wait:
        """Begins: this rank's share along dim 0 of the sum over all."""

    def all_gather(self, tensor: Tensor) -> Wait:
        """Begins: every rank's tensor behind each other along dim 0."""

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Wait:
        """Begins: the first send[0] elements to rank 0, and so on; receive[r] come from rank r."""


@dataclass(frozen=True)
class Group:
    """Parameters of one precision that the same ranks hold.

    Attributes:
        parameters: by name; with shapes as in `held`.
        held: how this rank holds them, in an order that all its ranks share.
        layout: who owns what of them.
        owners: ranks that hold the same parts and own them together.
        homes: the ranks that hold other parts of the same matrices.
        copies: further ranks with owners of their own, over which gradients are summed, too, and
            who do the same update.
        split_dim: by name of a joined parameter, the dimension that `homes` split.
        precision: what gradients are sent in.
    """

    parameters: Mapping[str, Parameter]
    held: Sequence[Held]
    layout: Layout
    owners: Ranks
    homes: Ranks
    copies: Sequence[Ranks] = ()
    split_dim: Mapping[str, int] | None = None
    precision: Precision = "fp32"


@dataclass(frozen=True)
class StatePiece:
    """A state, or the gradient, of some elements of a parameter.

    Attributes:
        kind: `master`, `momentum`, `exp_avg`, `exp_avg_sq`, `step` (one number) or `gradient`.
        name: of the parameter.
        tensor: the live state.
        start: first element of the parameter's flattened local part; of the whole matrices, where
            `whole`.
        whole: whether it has the whole of matrices of which the parameter here has a part.
    """

    kind: str
    name: str
    tensor: Tensor
    start: int = 0
    whole: bool = False


def check(group: Group) -> None:
    """Raise OptimError unless names and precision of a group go together."""
    names = {held.entry.name for held in group.held}
    if names != set(group.parameters):
        odd = sorted(names ^ set(group.parameters))
        raise OptimError(
            f"these parameters are in a group or in its table, but not in both: {odd[:5]}"
        )
    if len({parameter.dtype for parameter in group.parameters.values()}) > 1:
        raise OptimError("a group of parameters has several precisions; each needs its own")
