"""Softmax and loss of a chunk of logits: fused loops on a CPU, torch's functions elsewhere.

n tokens of a chunk; V the vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.kernels import host
from model.kernels.cross_entropy import host as fused

_LOG2E = math.log2(math.e)


def eager_softmax_loss(
    logits_nV: Tensor, target_n: Tensor, denominator: float, ignore_index: int, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Computes each token's cross-entropy, and the gradient with respect to the logits.

    The gradient is that of Σ loss / denominator.

    Args:
        target_n: int64; where it is ``ignore_index``, loss and gradient are 0.
        denominator: divides the gradient only; the caller divides the loss.

    Returns:
        fp32 [n], and [n, V] in the logits' dtype, or None unless ``needs_grad``. The logits may be
        overwritten.
    """
    if host.runs(logits_nV) and host.runs(target_n, dtype=torch.int64):
        return fused.softmax_loss(logits_nV, target_n, denominator, ignore_index, needs_grad)
    valid_n = target_n != ignore_index
    index_n1 = target_n.masked_fill(~valid_n, 0)[:, None]
    # Logits in base 2, less their maximum: exp2 is cheaper than exp.
    wide_nV = logits_nV.float().mul_(_LOG2E)
    wide_nV.sub_(wide_nV.amax(-1, keepdim=True))
    target_logit_n1 = wide_nV.gather(1, index_n1)
    powers_nV = wide_nV.exp2_()
    sum_n1 = powers_nV.sum(-1, keepdim=True)
    loss_n = (sum_n1.log2() - target_logit_n1)[:, 0] * valid_n / _LOG2E
    if not needs_grad:
        return loss_n, None
    token_weight_n1 = valid_n[:, None] / denominator
    grad_nV = powers_nV.mul_(token_weight_n1 / sum_n1)
    grad_nV.scatter_add_(1, index_n1, -token_weight_n1)
    return loss_n, grad_nV.to(logits_nV.dtype)
