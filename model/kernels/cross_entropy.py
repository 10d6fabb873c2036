"""Cross-entropy of a linear head that never holds the logits of more than one chunk of tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_CHUNK_LOGITS = 1 << 21
"""Logits held at once."""

_LOG2E = math.log2(math.e)


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, denominator: float, ignore: int
) -> Tensor:
    """Σ_t -log softmax(W h_t)[target_t] / denominator over the tokens that have a target, fp32.

    The gradients are formed in the forward pass, chunk by chunk while the logits are there, and
    only scaled in the backward pass.

    Args:
        hidden_TD, weight_VD: hidden states and head, of one dtype.
        target_T: int64 token ids, ``ignore`` where nothing is predicted.
        denominator: the number of predictions in the whole global batch.
    """
    needs_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    return _LinearCrossEntropy.apply(
        hidden_TD, weight_VD, target_T, float(denominator), ignore, needs_grad
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
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        valid_T = target != ignore
        target_T = target.masked_fill(~valid_T, 0)
        step = max(_CHUNK_LOGITS // weight.shape[0], 1)
        for start in range(0, hidden.shape[0], step):
            rows = slice(start, start + step)
            valid, index = valid_T[rows], target_T[rows, None]
            # Logits in base 2, less their maximum: exp2 is cheaper than exp.
            logits_nV = torch.mm(hidden[rows], weight.t()).float().mul_(_LOG2E)
            logits_nV.sub_(logits_nV.amax(-1, keepdim=True))
            picked = logits_nV.gather(1, index)
            powers_nV = logits_nV.exp2_()
            sum_n1 = powers_nV.sum(-1, keepdim=True)
            total += ((sum_n1.log2() - picked)[:, 0] * valid).sum()
            if grad_hidden is not None and grad_weight is not None:
                share_n1 = valid[:, None] / denominator
                grad = powers_nV.mul_(share_n1 / sum_n1)
                grad.scatter_add_(1, index, -share_n1)
                grad = grad.to(hidden.dtype)
                torch.mm(grad, weight, out=grad_hidden[rows])
                grad_weight += torch.mm(grad.t(), hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total / (_LOG2E * denominator)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden * grad_total.to(grad_hidden.dtype), grad_weight, *[None] * 4
