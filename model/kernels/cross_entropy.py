"""Cross-entropy of a linear head that never holds the logits of more than one chunk of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels import backend

CPU_LOGITS = 1 << 21
"""Logits held at once: as many as stay in a cache."""
ACCELERATOR_LOGITS = 1 << 28
"""The same elsewhere, where every chunk reads the whole head and adds to its whole gradient."""

_LOG2E = math.log2(math.e)


def chunk_tokens(vocab: int, device: torch.device) -> int:
    """Tokens whose logits are held at once."""
    held = CPU_LOGITS if device.type == "cpu" else ACCELERATOR_LOGITS
    return max(held // vocab, 1)


SoftmaxLoss = Callable[[Tensor, Tensor, float, int, bool], tuple[Tensor, Tensor | None]]
"""As `reference_softmax_loss`."""


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    denominator: float,
    ignore: int,
    softmax_loss: SoftmaxLoss | None = None,
) -> Tensor:
    """Σ_t -log softmax(W h_t)[target_t] / denominator over the tokens that have a target, fp32.

    The gradients are formed in the forward pass, chunk by chunk while the logits are there, and
    only scaled in the backward pass.

    Args:
        hidden_TD, weight_VD: hidden states and head, of one dtype.
        target_T: int64 token ids, ``ignore`` where nothing is predicted.
        denominator: the number of predictions in the whole global batch.
        softmax_loss: what is done to a chunk's logits, in place of what the backend chooses.
    """
    softmax_loss = softmax_loss or _implementation(hidden_TD)
    needs_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    return _LinearCrossEntropy.apply(
        hidden_TD, weight_VD, target_T, float(denominator), ignore, needs_grad, softmax_loss
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        denominator: float,
        ignore: int,
        needs_grad: bool,
        softmax_loss: SoftmaxLoss,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        step = chunk_tokens(weight.shape[0], hidden.device)
        for start in range(0, hidden.shape[0], step):
            rows = slice(start, start + step)
            logits_nV = torch.mm(hidden[rows], weight.t())
            loss_n, grad = softmax_loss(logits_nV, target[rows], denominator, ignore, needs_grad)
            total += loss_n.sum()
            if grad is not None and grad_hidden is not None and grad_weight is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
                grad_weight += torch.mm(grad.t(), hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total / denominator

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden * grad_total.to(grad_hidden.dtype), grad_weight, *[None] * 5


def _implementation(hidden: Tensor) -> SoftmaxLoss:
    if backend.cross_entropy(hidden.device, hidden.dtype).name == "triton":
        from model.kernels import cross_entropy_triton

        return cross_entropy_triton.softmax_loss
    return reference_softmax_loss


def reference_softmax_loss(
    logits_nV: Tensor, target_n: Tensor, denominator: float, ignore: int, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropies of logits, and what is to be added to the logits' gradients.

    Args:
        target_n: int64; where it is ``ignore``, loss and gradient are 0.
        denominator: what the gradient is divided by, and the loss is not.

    Returns:
        fp32 [n], and [n, V] in the logits' dtype, or None unless ``needs_grad``. The logits may
        have been overwritten.
    """
    valid_n = target_n != ignore
    index_n1 = target_n.masked_fill(~valid_n, 0)[:, None]
    # Logits in base 2, less their maximum: exp2 is cheaper than exp.
    wide_nV = logits_nV.float().mul_(_LOG2E)
    wide_nV.sub_(wide_nV.amax(-1, keepdim=True))
    picked_n1 = wide_nV.gather(1, index_n1)
    powers_nV = wide_nV.exp2_()
    sum_n1 = powers_nV.sum(-1, keepdim=True)
    loss_n = (sum_n1.log2() - picked_n1)[:, 0] * valid_n / _LOG2E
    if not needs_grad:
        return loss_n, None
    share_n1 = valid_n[:, None] / denominator
    grad_nV = powers_nV.mul_(share_n1 / sum_n1)
    grad_nV.scatter_add_(1, index_n1, -share_n1)
    return loss_n, grad_nV.to(logits_nV.dtype)
