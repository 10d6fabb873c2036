"""MoE permute and unpermute, each the adjoint of the other, without atomics.

T tokens; A experts of a token; L = T·A (token, choice) pairs; P rows in the order of experts,
padding included; E experts; D the hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.kernels.operations import EAGER, Choice
from model.kernels.permute.eager import eager_unpermute, sort_pairs

__all__ = ["permute_rows", "sort_pairs", "unpermute_rows"]


def permute_rows(
    x_TD: Tensor, token_of_row_P: Tensor, row_of_pair_L: Tensor, choice: Choice = EAGER
) -> Tensor:
    """Copies each token's row to the rows of its A pairs: out[p] = x[token_of_row[p]], [P, D].

    Args:
        token_of_row_P: the token of each row. Padding rows hold a copy of some token's row; see
            ``row_of_pair_L``.
        row_of_pair_L: index of each pair's row, all distinct; only these rows propagate gradients.
            Pair token · A + choice is a token's choice.
    """
    return _Permute.apply(x_TD, token_of_row_P, row_of_pair_L, choice)


def unpermute_rows(
    y_PD: Tensor,
    token_of_row_P: Tensor,
    row_of_pair_L: Tensor,
    tokens: int,
    choice: Choice = EAGER,
) -> Tensor:
    """Sums each token's A rows in the order of its choices, [T, D].

    Padding rows get a nonzero gradient (that of the token whose index they carry), so what they
    contain must not depend on any parameter (a weight of 0 ensures it).
    """
    return _Unpermute.apply(y_PD, token_of_row_P, row_of_pair_L, tokens, choice)


def _unpermute(y_PD: Tensor, row_of_pair_L: Tensor, tokens: int, choice: Choice) -> Tensor:
    if choice.name == "triton":
        from model.kernels.permute import unpermute_triton

        return unpermute_triton.unpermute(y_PD, row_of_pair_L, tokens, **choice.blocks)
    return eager_unpermute(y_PD, row_of_pair_L, tokens)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, token_of_row: Tensor, row_of_pair: Tensor, choice: Choice
    ) -> Tensor:
        ctx.save_for_backward(row_of_pair)
        ctx.tokens, ctx.choice = x.shape[0], choice
        return x.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (row_of_pair,) = ctx.saved_tensors
        return _unpermute(grad, row_of_pair, ctx.tokens, ctx.choice), None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        token_of_row: Tensor,
        row_of_pair: Tensor,
        tokens: int,
        choice: Choice,
    ) -> Tensor:
        ctx.save_for_backward(token_of_row)
        return _unpermute(y, row_of_pair, tokens, choice)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (token_of_row,) = ctx.saved_tensors
        return grad.index_select(0, token_of_row), None, None, None, None
