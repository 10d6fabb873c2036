"""Selection of experts, their weights and the balance loss as fused loops for a CPU, in fp32.

T tokens; E experts; A experts of a token; Z samples.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.kernels import host
from model.kernels.host import Array, fused_loop

_F32 = np.float32


def route(
    softplus_TE: Tensor, bias_E: Tensor | None, indices_TA: Tensor | None, top_k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns scores [T, E], and indices and weights of the experts [T, A], selected if None."""
    scores_TE = torch.empty_like(softplus_TE)
    bias_E = softplus_TE.new_zeros(softplus_TE.shape[1]) if bias_E is None else bias_E
    selects = indices_TA is None
    if indices_TA is None:
        indices_TA = softplus_TE.new_empty(len(softplus_TE), top_k, dtype=torch.int64)
    indices_TA = indices_TA.contiguous()
    weights_TA = softplus_TE.new_empty(indices_TA.shape)
    host.over_rows(
        _route_rows, softplus_TE, bias_E, selects, scale, scores_TE, indices_TA, weights_TA
    )
    return scores_TE, indices_TA, weights_TA


def route_gradient(
    logits_TE: Tensor,
    scores_TE: Tensor,
    indices_TA: Tensor,
    scale: float,
    grad_scores_TE: Tensor | None,
    grad_weights_TA: Tensor,
) -> Tensor:
    """Returns the logits' gradient from those of scores, if any, and weights."""
    grad_TE = torch.empty_like(logits_TE)
    grad_scores_TE = logits_TE.new_empty(0, 0) if grad_scores_TE is None else grad_scores_TE
    host.over_rows(
        _route_gradient_rows,
        *(grad_TE, logits_TE, scores_TE, indices_TA, scale, grad_scores_TE, grad_weights_TA),
    )
    return grad_TE


def sample_sums(
    scores_TE: Tensor, indices_TA: Tensor, sample_T: Tensor, samples: int
) -> tuple[Tensor, Tensor]:
    """Sums each sample's tokens of score / Σ scores, and counts its tokens by expert, [Z, E]."""
    shares_ZE = scores_TE.new_zeros(samples, scores_TE.shape[1])
    counts_ZE = torch.zeros_like(shares_ZE)
    tensors = (scores_TE, indices_TA, sample_T, shares_ZE, counts_ZE)
    _sum_samples(*map(host.array, tensors))
    return shares_ZE, counts_ZE


def share_gradient(scores_TE: Tensor, sample_T: Tensor, grad_ZE: Tensor) -> Tensor:
    """Returns the scores' gradient from that of their samples' shares."""
    grad_TE = torch.empty_like(scores_TE)
    host.over_rows(_share_gradient_rows, grad_TE, scores_TE, sample_T, grad_ZE)
    return grad_TE


@fused_loop
def _route_rows(
    start: int,
    stop: int,
    softplus: Array,
    bias: Array,
    selects: bool,
    scale: float,
    scores: Array,
    indices: Any,
    weights: Array,
) -> None:
    experts, top_k = softplus.shape[1], indices.shape[1]
    best = np.empty(top_k, _F32)
    floor = _F32(2.0**-126)  # the smallest normal number keeps the root differentiable
    for t in range(start, stop):
        s, index = scores[t], indices[t]
        for e in range(experts):
            x = softplus[t, e]
            s[e] = math.sqrt(floor if x < floor else x)
        if selects:
            for a in range(top_k):
                best[a], index[a] = -np.inf, a
            for e in range(experts):
                x = s[e] + bias[e]
                is_nan = x != x  # which counts as the largest, so that it shows in the weights
                if not (is_nan or x > best[top_k - 1]):
                    continue
                place = top_k - 1
                while place > 0 and (is_nan or x > best[place - 1]):
                    best[place], index[place] = best[place - 1], index[place - 1]
                    place -= 1
                best[place], index[place] = x, e
        total = _F32(0)
        for a in range(top_k):
            total += s[index[a]]
        factor = _F32(scale) / (total + _F32(1e-20))
        for a in range(top_k):
            weights[t, a] = s[index[a]] * factor


@fused_loop
def _route_gradient_rows(
    start: int,
    stop: int,
    grad: Array,
    logits: Array,
    scores: Array,
    indices: Any,
    scale: float,
    grad_scores: Array,
    grad_weights: Array,
) -> None:
    experts, top_k = logits.shape[1], indices.shape[1]
    for t in range(start, stop):
        g, s, index = grad[t], scores[t], indices[t]
        for e in range(experts):
            g[e] = 0
        total, along = _F32(1e-20), _F32(0)
        for a in range(top_k):
            total += s[index[a]]
            along += grad_weights[t, a] * s[index[a]]
        along /= total
        for a in range(top_k):
            g[index[a]] = (grad_weights[t, a] - along) * _F32(scale) / total
        if len(grad_scores):
            for e in range(experts):
                g[e] += grad_scores[t, e]
        for e in range(experts):
            # d sqrt(softplus(x)) = sigmoid(x) / (2 sqrt(softplus(x))); 0 where that is floored
            x = logits[t, e]
            if g[e] != 0:
                slope = _F32(1) / (_F32(1) + math.exp(-x)) / (_F32(2) * s[e])
                g[e] = _F32(0) if x < _F32(-87.33654) else g[e] * slope


@fused_loop
def _sum_samples(scores: Array, indices: Any, sample: Any, shares: Array, counts: Array) -> None:
    for t in range(len(scores)):
        s, out, count = scores[t], shares[sample[t]], counts[sample[t]]
        total = _F32(0)
        for e in range(len(s)):
            total += s[e]
        factor = _F32(1) / total
        for e in range(len(s)):
            out[e] += s[e] * factor
        for a in range(indices.shape[1]):
            count[indices[t, a]] += 1


@fused_loop
def _share_gradient_rows(
    start: int, stop: int, grad: Array, scores: Array, sample: Any, grad_shares: Array
) -> None:
    for t in range(start, stop):
        g, s, d = grad[t], scores[t], grad_shares[sample[t]]
        total, along = _F32(0), _F32(0)
        for e in range(len(s)):
            total += s[e]
            along += d[e] * s[e]
        factor = _F32(1) / total
        along *= factor
        for e in range(len(s)):
            g[e] = (d[e] - along) * factor
