"""Log-probabilities of chosen tokens, from hidden states, without whole logits.

Letters: T tokens (queries of this rank), n of a chunk, D hidden size, v vocabulary of this tensor
rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model import IGNORE_INDEX
from model.kernels.cross_entropy import chunk_tokens
from trainer.parallel.collectives import all_reduce_, all_reduce_max_
from trainer.parallel.grid import Axis
from trainer.post.vocabulary import add_products, wide_logits


def log_probabilities(
    hidden_TD: Tensor, weight_vD: Tensor, target_T: Tensor, axis: Axis, temperature: float = 1.0
) -> Tensor:
    """Returns log softmax(W h_t / temperature)[target_t], fp32 [T]; 0 where there is no target.

    Backward forms the logits of each chunk again. Every tensor rank returns the same; the gradient
    of `hidden_TD` is partial, from this rank's part of the vocabulary alone, and expects the same
    gradient of the result on every tensor rank.

    Args:
        target_T: int64 token ids of the whole vocabulary, or IGNORE_INDEX.
        axis: the tensor ranks.
        temperature: that of sampling, so that these are the probabilities of its draws.
    """
    result: Tensor = _LogProbabilities.apply(hidden_TD, weight_vD, target_T, axis, temperature)
    return result


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, axis: Axis, temperature: float
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        chosen = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
        log_sum = torch.zeros_like(chosen)
        step = chunk_tokens(weight.shape[0], hidden.device)
        for start in range(0, hidden.shape[0], step):
            rows = slice(start, start + step)
            logits_nv = wide_logits(hidden[rows], weight).div_(temperature)
            top_n = all_reduce_max_(logits_nv.amax(-1), axis)
            logits_nv.sub_(top_n[:, None])
            index_n1, is_own_n1 = _local_targets(target[rows], weight.shape[0], axis)
            chosen_n = (logits_nv.gather(1, index_n1) * is_own_n1)[:, 0]
            sums_2n = torch.stack([chosen_n, logits_nv.exp_().sum(-1)])
            chosen_n, sum_n = all_reduce_(sums_2n, axis).unbind(0)
            chosen[rows] = chosen_n - sum_n.log()
            log_sum[rows] = sum_n.log() + top_n
        ctx.save_for_backward(hidden, weight, target, log_sum)
        ctx.axis, ctx.temperature = axis, temperature
        return chosen.masked_fill(target == IGNORE_INDEX, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, log_sum = ctx.saved_tensors
        grad = grad.masked_fill(target == IGNORE_INDEX, 0.0) / ctx.temperature
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=log_sum.dtype)
        step = chunk_tokens(weight.shape[0], hidden.device)
        for start in range(0, hidden.shape[0], step):
            rows = slice(start, start + step)
            logits_nv = wide_logits(hidden[rows], weight).div_(ctx.temperature)
            grad_n1 = grad[rows, None]
            grad_nv = logits_nv.sub_(log_sum[rows, None]).exp_().mul_(-grad_n1)
            index_n1, is_own_n1 = _local_targets(target[rows], weight.shape[0], ctx.axis)
            grad_nv.scatter_add_(1, index_n1, grad_n1 * is_own_n1)
            grad_hidden[rows] = add_products(grad_nv, hidden[rows], weight, grad_weight)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _local_targets(target_n: Tensor, size: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """Returns indices [n, 1] into this rank's part of the vocabulary, and where they are in it."""
    index_n1 = target_n[:, None] - axis.rank * size
    is_own_n1 = (index_n1 >= 0) & (index_n1 < size)
    return index_n1.where(is_own_n1, 0), is_own_n1
