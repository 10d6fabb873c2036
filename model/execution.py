"""How a model computes and communicates; `ModelConfig` says what it computes.

The results are the same with any Execution, up to rounding. trainer/parallel/plan.py builds the
Execution of a training run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

from torch import Tensor

from model.config import ModelConfig
from model.dispatch import Dispatch, LocalDispatch
from model.exchange import Exchange, LocalExchange
from model.kernels.cross_entropy import linear_cross_entropy
from model.kernels.operations import ALL_EAGER, Kernels
from model.layout import SampleLayout
from model.linear import UNQUANTISED, Matmuls, fp8_matmuls, unquantised_matmuls
from model.positions import Positions

BlockPart = Literal["streams", "norms", "attention", "block"]
CrossEntropy = Callable[[Tensor, Tensor, Tensor, float, int], Tensor]
"""(hidden states, head weight, targets, denominator, ignore_index) -> loss."""
PlaceTokens = Callable[[ModelConfig, SampleLayout], tuple[Positions, Exchange]]
"""(config, layout of the microbatch) -> this rank's Positions and Exchange."""


class Objective(Protocol):
    """The main head's loss in place of cross-entropy, such as that of training on own samples."""

    def __call__(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        signals: Mapping[str, Tensor],
        denominator: float,
    ) -> Tensor:
        """Returns the sum over the queries with a target, divided by `denominator`, fp32.

        Args:
            weight_VD: this rank's rows of the head. The gradient of the hidden states is that of
                these rows alone, as with `cross_entropy`.
            targets_T: token ids, or ``IGNORE_INDEX``.
            signals: further values of the queries by name, [T] or [T, X].
        """


class CallPart(Protocol):
    """Calls a part of a block, plainly or as trainer/parallel/recompute.py does."""

    def __call__(self, part: BlockPart, function: Callable[..., Any], *inputs: Any) -> Any:
        """Returns the function's result."""


def call_plainly(part: BlockPart, function: Callable[..., Any], *inputs: Any) -> Any:
    """Calls the function; autograd saves what backward needs."""
    return function(*inputs)


def place_locally(config: ModelConfig, layout: SampleLayout) -> tuple[Positions, Exchange]:
    """Returns Positions and Exchange of one process that holds all tokens."""
    return Positions.of_microbatch(config, layout), LocalExchange()


@dataclass(frozen=True)
class Execution:
    """How a model runs; by default on one process, in plain eager PyTorch.

    `local_execution` makes one whose matmuls, dispatch and cross-entropy use its `kernels`.

    Attributes:
        matmuls: the matmuls of linears and experts, in the dtype of their tensors or in FP8.
        kernels: the implementation of every operation.
        call_part: calls a part of a block, plainly or under activation checkpointing.
        dispatch: sends tokens to their experts and combines the results.
        place_tokens: maps a microbatch's layout to the part that this rank holds.
        cross_entropy: the loss of the output heads.
    """

    matmuls: Matmuls = UNQUANTISED
    kernels: Kernels = ALL_EAGER
    call_part: CallPart = call_plainly
    dispatch: Dispatch = field(default_factory=LocalDispatch)
    place_tokens: PlaceTokens = place_locally
    cross_entropy: CrossEntropy = linear_cross_entropy


LOCAL = Execution()


def local_execution(kernels: Kernels = ALL_EAGER, in_fp8: bool = False) -> Execution:
    """Returns the Execution of one process with these kernels, its matmuls in FP8 or not."""
    return Execution(
        matmuls=fp8_matmuls(kernels.fp8) if in_fp8 else unquantised_matmuls(kernels.grouped_mm),
        kernels=kernels,
        dispatch=LocalDispatch(kernels.permute),
        cross_entropy=partial(linear_cross_entropy, choice=kernels.cross_entropy),
    )
