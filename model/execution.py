"""What a model is given besides its configuration: how it computes, and how it communicates.

The mathematics is the same with any of these. trainer/parallel/plan.py makes those of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from model.config import ModelConfig
from model.dispatch import Dispatch, LocalDispatch
from model.exchange import Exchange, LocalExchange
from model.kernels.cross_entropy import linear_cross_entropy
from model.layout import SampleLayout
from model.linear import PLAIN, Matmuls
from model.pointwise import EAGER_OR_TRITON, PointwiseOps
from model.positions import Positions

BlockPart = Literal["streams", "norms", "attention", "block"]
CrossEntropy = Callable[[Tensor, Tensor, Tensor, float, int], Tensor]
"""Hidden states, the head's weight, targets, denominator and ignored target to the loss."""
PlaceTokens = Callable[[ModelConfig, SampleLayout], tuple[Positions, Exchange]]
"""A microbatch's samples to where a rank's tokens are, and to how it reaches the others."""


class Compute(Protocol):
    """How a block calls its parts: at once, or so that backward computes them again."""

    def __call__(self, part: BlockPart, function: Callable[..., Any], *inputs: Any) -> Any:
        """The function's result."""


def compute_now(part: BlockPart, function: Callable[..., Any], *inputs: Any) -> Any:
    """Calls the function, and keeps what its backward needs."""
    return function(*inputs)


def place_locally(config: ModelConfig, layout: SampleLayout) -> tuple[Positions, Exchange]:
    """All tokens of a microbatch on this process."""
    return Positions.of_microbatch(config, layout), LocalExchange()


@dataclass(frozen=True)
class Execution:
    """How a model runs; by default on one process, with kernels as the device has them.

    Attributes:
        matmuls: of linears and experts, in the precision of their tensors or in FP8.
        pointwise: norms, SwiGLU and the mixing of streams, compiled or not.
        compute: what a block keeps for backward.
        dispatch: tokens to their experts.
        place_tokens: rows of tokens to ranks.
        cross_entropy: of the output heads.
    """

    matmuls: Matmuls = PLAIN
    pointwise: PointwiseOps = EAGER_OR_TRITON
    compute: Compute = compute_now
    dispatch: Dispatch = field(default_factory=LocalDispatch)
    place_tokens: PlaceTokens = place_locally
    cross_entropy: CrossEntropy = linear_cross_entropy


LOCAL = Execution()
