"""Rows to their experts and back, each the other's adjoint, without atomic additions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def spread_rows(x_TD: Tensor, order_P: Tensor, place_P: Tensor) -> Tensor:
    """Copy each token's row to its A places: out[p] = x[order[p] // A], [P, D] with P = T·A.

    Args:
        order_P: a permutation of the (token, choice) pairs, numbered token · A + choice.
        place_P: its inverse.
    """
    return _Spread.apply(x_TD, order_P, place_P)


def collect_rows(y_PD: Tensor, order_P: Tensor, place_P: Tensor, tokens: int) -> Tensor:
    """Sum of each token's A rows in the order of its choices: the adjoint of ``spread_rows``."""
    return _Collect.apply(y_PD, order_P, place_P, tokens)


def _spread(x_TD: Tensor, order_P: Tensor) -> Tensor:
    choices = order_P.shape[0] // x_TD.shape[0]
    return x_TD.index_select(0, order_P // choices)


def _collect(y_PD: Tensor, place_P: Tensor, tokens: int) -> Tensor:
    return y_PD.index_select(0, place_P).unflatten(0, (tokens, -1)).sum(1)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, order, place) -> Tensor:
        ctx.save_for_backward(place)
        ctx.tokens = x.shape[0]
        return _spread(x, order)

    @staticmethod
    def backward(ctx: Any, grad) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return _collect(grad, place, ctx.tokens), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y, order, place, tokens) -> Tensor:
        ctx.save_for_backward(order)
        return _collect(y, place, tokens)

    @staticmethod
    def backward(ctx: Any, grad) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return _spread(grad, order), None, None, None
