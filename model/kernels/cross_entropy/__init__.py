"""Cross-entropy of a linear head that never holds the logits of more than one chunk of tokens.

T tokens, n of a chunk; D the hidden width; V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.kernels.cross_entropy.eager import eager_softmax_loss
from model.kernels.operations import EAGER, Choice

CPU_LOGITS = 1 << 21
"""Logits per chunk on a CPU: as many as stay in a core's cache."""
ACCELERATOR_LOGITS = 1 << 28
"""On accelerators: larger, because every chunk reads all of the head and updates all of its
gradient."""


def chunk_tokens(vocab: int, device: torch.device) -> int:
    """Returns the number of tokens per chunk."""
    logits = CPU_LOGITS if device.type == "cpu" else ACCELERATOR_LOGITS
    return max(logits // vocab, 1)


SoftmaxLoss = Callable[[Tensor, Tensor, float, int, bool], tuple[Tensor, Tensor | None]]
"""A function with the arguments and results of `eager_softmax_loss`."""


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    denominator: float,
    ignore_index: int,
    choice: Choice = EAGER,
) -> Tensor:
    """Computes Σ_t -log softmax(W h_t)[target_t] / denominator over the tokens that have a target.

    The result is fp32. The gradients are computed in the forward pass, chunk by chunk while the
    logits are in memory, and only scaled in the backward pass.

    Args:
        hidden_TD, weight_VD: hidden states and head, of one dtype.
        target_T: int64 token ids, or ``ignore_index`` for positions without a target.
        denominator: the number of predictions in the whole global batch.
        choice: the implementation of a chunk's softmax, loss and gradient.
    """
    softmax_loss = _implementation(choice)
    needs_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    return _LinearCrossEntropy.apply(
        hidden_TD, weight_VD, target_T, float(denominator), ignore_index, needs_grad, softmax_loss
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        denominator: float,
        ignore_index: int,
        needs_grad: bool,
        softmax_loss: SoftmaxLoss,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        make_weight = torch.empty_like if len(hidden) else torch.zeros_like
        grad_weight = make_weight(weight, dtype=torch.float32) if needs_grad else None
        step = chunk_tokens(weight.shape[0], hidden.device)
        for start in range(0, hidden.shape[0], step):
            rows = slice(start, start + step)
            logits_nV = torch.mm(hidden[rows], weight.t())
            loss_n, grad = softmax_loss(
                logits_nV, target[rows], denominator, ignore_index, needs_grad
            )
            total += loss_n.sum()
            if grad is not None and grad_hidden is not None and grad_weight is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
                _accumulate(grad_weight, grad, hidden[rows], is_first=start == 0)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total / denominator

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_total.device.type != "cpu" or grad_total != 1:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
            grad_weight = grad_weight * grad_total
        return grad_hidden, grad_weight.to(ctx.weight_dtype), *[None] * 5


def _accumulate(grad_weight: Tensor, grad: Tensor, hidden: Tensor, is_first: bool) -> None:
    """Adds gradᵀ · hidden of one chunk, or writes it over what the first chunk finds."""
    if grad.dtype == grad_weight.dtype:
        grad_weight.addmm_(grad.t(), hidden, beta=0 if is_first else 1)
    elif is_first:
        grad_weight.copy_(torch.mm(grad.t(), hidden))
    else:
        grad_weight += torch.mm(grad.t(), hidden)


def _implementation(choice: Choice) -> SoftmaxLoss:
    if choice.name == "triton":
        from model.kernels.cross_entropy import softmax_triton

        softmax_loss: Callable[..., Any] = softmax_triton.softmax_loss
        return partial(softmax_loss, **choice.blocks)
    return eager_softmax_loss
