"""The matmuls of linears and experts: in the precision of their tensors, in FP8, or to fp32.

Letters: T tokens, P rows of experts, G groups of the output projection, E experts, X in_features,
Y out_features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels import fp8
from model.kernels.grouped_mm import grouped_mm, grouped_mm_pair
from model.kernels.operations import EAGER, Choice
from model.kernels.tensor_cores import tf32_matmuls


@dataclass(frozen=True)
class Matmuls:
    """The matmuls with weights [.., Y, X].

    Attributes:
        linear: x [.., X] and weight [Y, X] to [.., Y].
        batched: x [G, T, X] and weights [G, Y, X] to [G, T, Y], each group by itself.
        grouped: x [P, X] sorted by expert, weights [E, Y, X], and int32 [E], where each expert's
            rows end; returns [P, Y]. Rows after the last end are not computed.
        grouped_pair: the same rows with the weights of two grouped matmuls; returns both results.
    """

    linear: Callable[[Tensor, Tensor], Tensor]
    batched: Callable[[Tensor, Tensor], Tensor]
    grouped: Callable[[Tensor, Tensor, Tensor], Tensor]
    grouped_pair: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _batched(x_GTX: Tensor, weight_GYX: Tensor) -> Tensor:
    return torch.bmm(x_GTX, weight_GYX.transpose(1, 2))


UNQUANTISED = Matmuls(F.linear, _batched, grouped_mm, grouped_mm_pair)


def unquantised_matmuls(choice: Choice = EAGER) -> Matmuls:
    """Returns matmuls in the dtype of their tensors; `choice` is that of the experts'."""
    grouped, pair = partial(grouped_mm, choice=choice), partial(grouped_mm_pair, choice=choice)
    return replace(UNQUANTISED, grouped=grouped, grouped_pair=pair)


def fp8_matmuls(choice: Choice = EAGER) -> Matmuls:
    """Returns matmuls in FP8, of linears and experts.

    Compressors' projections are `FP32OutLinear`s, and the router multiplies in fp32; the output
    head, the indexer's head weights and hyper-connections multiply in the precision of their
    weights.
    """
    return Matmuls(
        partial(fp8.linear, choice=choice),
        partial(fp8.batched, choice=choice),
        partial(fp8.grouped, choice=choice),
        partial(fp8.grouped_pair, choice=choice),
    )


class Linear(nn.Linear):
    """A linear without bias whose matmul may be in FP8."""

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, matmuls: Matmuls
    ) -> None:
        super().__init__(in_features, out_features, bias=False, dtype=dtype)
        self.matmuls = matmuls

    def forward(self, x: Tensor) -> Tensor:
        """[.., X] to [.., Y]."""
        return self.matmuls.linear(x, self.weight)


class FP32OutLinear(nn.Linear):
    """A linear without bias that returns the fp32 sums of its products, whatever its dtype.

    Backward rounds the gradient of the result to the weight's dtype, which others have already.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[T, X] to fp32 [T, Y]."""
        if x.dtype == torch.float32:
            return F.linear(x, self.weight)
        return _FP32Out.apply(x, self.weight)


class _FP32Out(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TX: Tensor, weight_YX: Tensor) -> Tensor:
        ctx.save_for_backward(x_TX, weight_YX)
        if x_TX.device.type == "cpu":  # which has no such matmul; fp32 holds the factors exactly
            return F.linear(x_TX.float(), weight_YX.float())
        return torch.mm(x_TX, weight_YX.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_TY: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TX, weight_YX = ctx.saved_tensors
        grad_TY = grad_TY.to(x_TX.dtype)
        grad_x = grad_TY @ weight_YX if ctx.needs_input_grad[0] else None
        grad_weight = grad_TY.t() @ x_TX if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def fp32_linear(x_TX: Tensor, weight_YX: Tensor) -> Tensor:
    """Multiplies in fp32, whatever the dtype: [T, X] and [Y, X] to fp32 [T, Y].

    On a GPU, tensor cores multiply numbers of bf16, whose products and sums are the same there;
    backward rounds the gradient of the result to TF32, 4 bits more than those of x and weight
    have.
    """
    if not x_TX.is_cuda or x_TX.dtype == torch.float32:
        return F.linear(x_TX.float(), weight_YX.float())
    return _FP32Linear.apply(x_TX, weight_YX)


class _FP32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TX: Tensor, weight_YX: Tensor) -> Tensor:
        ctx.save_for_backward(x_TX, weight_YX)
        return torch.mm(x_TX, weight_YX.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_TY: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TX, weight_YX = ctx.saved_tensors
        grad_x = grad_weight = None
        with tf32_matmuls(x_TX):
            if ctx.needs_input_grad[0]:
                grad_x = (grad_TY @ weight_YX.float()).to(x_TX.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = (grad_TY.t() @ x_TX.float()).to(weight_YX.dtype)
        return grad_x, grad_weight
