"""Selection of experts and their shares of samples: fused loops on a CPU, torch elsewhere.

T tokens; E experts; A experts of a token, L = T·A; Z samples.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import host
from model.kernels.router import host as fused

_TINY = torch.finfo(torch.float32).tiny
_BELOW_TINY = _TINY * (1 - 2.0**-23)


def route(
    logits_TE: Tensor, bias_E: Tensor | None, indices_TA: Tensor | None, top_k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores experts by sqrt(softplus(logits)), and selects some of them.

    Args:
        logits_TE: fp32.
        bias_E: fp32, added to the scores for the selection alone; None for 0.
        indices_TA: int64, experts to use instead of the ``top_k`` with the largest score + bias.
        scale: the sum of a token's weights.

    Returns:
        scores [T, E]; indices [T, A], the largest first; and weights [T, A], the selected scores
        normalised, times ``scale``.
    """
    if host.runs(logits_TE, bias_E):
        return _Route.apply(logits_TE, bias_E, indices_TA, top_k, scale)
    scores_TE = _SqrtSoftplus.apply(logits_TE)
    if indices_TA is None:
        ranks_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
        indices_TA = ranks_TE.topk(top_k, dim=-1).indices
    weights_TA = _Normalised.apply(scores_TE.gather(1, indices_TA), 1e-20) * scale
    return scores_TE, indices_TA, weights_TA


def sample_sums(
    scores_TE: Tensor,
    indices_TA: Tensor,
    sample_T: Tensor,
    samples: int,
    first_slot_T1: Tensor,
    ones_L: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sums each sample's shares score / Σ scores, and counts its tokens by expert, [Z, E].

    Args:
        first_slot_T1: sample · E of each token.
        ones_L: ones, fp32.
    """
    if host.runs(scores_TE) and host.runs(indices_TA, sample_T, dtype=torch.int64):
        return _SampleSums.apply(scores_TE, indices_TA, sample_T, samples)
    share_TE = _Normalised.apply(scores_TE, 0.0)
    share_ZE = share_TE.new_zeros(samples, scores_TE.shape[1])
    share_ZE.index_add_(0, sample_T, share_TE)
    slot_L = (first_slot_T1 + indices_TA).flatten()
    count_ZE = share_TE.new_zeros(share_ZE.numel()).index_add_(0, slot_L, ones_L)
    return share_ZE, count_ZE.view_as(share_ZE)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        bias: Tensor | None,
        indices: Tensor | None,
        top_k: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        results = fused.route(F.softplus(logits), bias, indices, top_k, scale)
        ctx.save_for_backward(logits, *results[:2])
        ctx.scale = scale
        ctx.mark_non_differentiable(results[1])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(
        ctx: Any, grad_scores: Tensor | None, _: None, grad_weights: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, scores, indices = ctx.saved_tensors
        grad_weights = logits.new_zeros(indices.shape) if grad_weights is None else grad_weights
        grad = fused.route_gradient(logits, scores, indices, ctx.scale, grad_scores, grad_weights)
        return grad, None, None, None, None


class _SampleSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, indices: Tensor, sample: Tensor, samples: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(scores, sample)
        shares, counts = fused.sample_sums(scores, indices, sample, samples)
        ctx.mark_non_differentiable(counts)
        return shares, counts

    @staticmethod
    def backward(ctx: Any, grad_shares: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        scores, sample = ctx.saved_tensors
        return fused.share_gradient(scores, sample, grad_shares), None, None, None


class _SqrtSoftplus(torch.autograd.Function):
    """sqrt(softplus(x)), with the backward of autograd in fewer launches.

    A floor keeps the root differentiable where softplus underflows to zero.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        softplus = F.softplus(logits)
        scores = softplus.clamp(min=_TINY).sqrt_()
        ctx.save_for_backward(logits, softplus, scores)
        return scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        logits, softplus, scores = ctx.saved_tensors
        # Zero below the floor; at the floor itself clamp has a gradient.
        grad = torch.ops.aten.threshold_backward(grad / (2 * scores), softplus, _BELOW_TINY)
        return torch.ops.aten.softplus_backward(grad, logits, 1, 20)


class _Normalised(torch.autograd.Function):
    """x / (x.sum(-1) + eps), with the backward of autograd in fewer launches."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        total = x.sum(-1, keepdim=True)
        if eps:
            total += eps
        out = x / total
        ctx.save_for_backward(out, total)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out, total = ctx.saved_tensors
        return grad / total - (grad * (out / total)).sum(-1, keepdim=True), None
