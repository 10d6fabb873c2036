"""Rows to their experts and back, each the adjoint of the other, without atomic additions.

T tokens; A experts of a token; L = T·A (token, choice) pairs; P places in the order of experts; D
the hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.kernels import backend
from model.kernels.permute.eager import eager_unpermute


def permute_rows(x_TD: Tensor, order_P: Tensor, place_L: Tensor) -> Tensor:
    """Copies each token's row to its A places: out[p] = x[order[p] // A], [P, D].

    Args:
        order_P: which of the L = T·A (token, choice) pairs, numbered token · A + choice, stands at
            each place. A place that belongs to no pair holds the copy of any; see ``place_L``.
        place_L: the place of each pair, all different. Gradients come back through these only.
    """
    return _Permute.apply(x_TD, order_P, place_L)


def unpermute_rows(y_PD: Tensor, order_P: Tensor, place_L: Tensor, tokens: int) -> Tensor:
    """Sums each token's A rows in the order of its choices, [T, D]: the way back.

    The gradient of a place that belongs to no pair is not zero but that of the pair copied there;
    what stands at such a place must not depend on any parameter (a weight of 0 sees to it).
    """
    return _Unpermute.apply(y_PD, order_P, place_L, tokens)


def _permute(x_TD: Tensor, order_P: Tensor, choices: int) -> Tensor:
    return x_TD.index_select(0, order_P // choices)


def _unpermute(y_PD: Tensor, place_L: Tensor, tokens: int) -> Tensor:
    if backend.experts(y_PD.device, y_PD.dtype).name == "triton":
        from model.kernels.permute import unpermute_triton

        return unpermute_triton.unpermute(y_PD, place_L, tokens)
    return eager_unpermute(y_PD, place_L, tokens)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.tokens = x.shape[0]
        return _permute(x, order, place.shape[0] // x.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return _unpermute(grad, place, ctx.tokens), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, place: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.choices = place.shape[0] // tokens
        return _unpermute(y, place, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return _permute(grad, order, ctx.choices), None, None, None
