"""The indexer's objective: its scores compared with core attention's probabilities (V3.2).

For every query, KL(p ‖ softmax(s)) over a set of entries: s are the indexer's scores, and p is the
probability mass that core attention gave to each entry, summed over heads and divided by its sum
over the set. The set is all entries that the query sees (mode "warmup"), or those selected for it
(mode "sparse"). Only the indexer's queries, keys and head weights get a gradient; p is a constant.

T queries; I index heads; J their width; C entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.kernels.indexer.inputs import IndexerInputs
from model.kernels.indexer.kl_target import KLTarget
from model.kernels.indexer.loss_eager import eager_objective
from model.kernels.operations import EAGER, Choice

ComputeObjective = Callable[
    [IndexerInputs, KLTarget, Tensor, bool], tuple[Tensor, Sequence[Tensor]]
]
"""A function with the arguments and results of `eager_objective`."""


def indexer_objective(
    inputs: IndexerInputs,
    target: KLTarget,
    weight_T: Tensor,
    choice: Choice = EAGER,
) -> Tensor:
    """Computes Σ_t weight_t · KL(p_t ‖ softmax(s_t)) as a 0-dim tensor.

    The gradient is computed in forward, block by block, while scores and mass are in memory, so the
    target is not kept for backward and backward needs no communication.

    Args:
        inputs: compute them from detached activations if only the indexer is to be trained.
        weight_T: fp32 weight of each query. A query with an empty set, or whose set got no mass,
            contributes 0 and has no gradient.
        choice: the implementation of objective and gradients.
    """
    tensors = (inputs.q_TIJ, inputs.keys_CJ, inputs.weights_TI)
    return _Objective.apply(
        *tensors, target, weight_T, torch.is_grad_enabled(), _implementation(choice)
    )


def _implementation(choice: Choice) -> ComputeObjective:
    if choice.name == "triton":
        from model.kernels.indexer import loss_triton

        objective: Callable[..., Any] = loss_triton.objective
        return partial(objective, **choice.blocks)
    return eager_objective


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        keys: Tensor,
        weights: Tensor,
        target: KLTarget,
        weight: Tensor,
        grad_enabled: bool,
        compute: ComputeObjective,
    ) -> Tensor:
        needs_grad = grad_enabled and any(ctx.needs_input_grad[:3])
        inputs = IndexerInputs(q, keys, weights)
        total, gradients = compute(inputs, target, weight, needs_grad)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (gradient * grad.to(gradient.dtype) for gradient in ctx.saved_tensors)
        return *gradients, *[None] * 4
