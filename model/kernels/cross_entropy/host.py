"""Softmax and loss of a chunk of logits as fused loops for a CPU, in fp32.

torch computes the exponentials between them. n tokens of a chunk; V the vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from model.kernels import host
from model.kernels.host import Array, fused_loop

_LOG2E = math.log2(math.e)
_LANES = 16
_F32 = np.float32


def softmax_loss(
    logits_nV: Tensor, target_n: Tensor, denominator: float, ignore_index: int, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Computes `model.kernels.cross_entropy.eager.eager_softmax_loss`; overwrites the logits.

    Raises:
        IndexError: a target is neither a token id nor ``ignore_index``.
    """
    target, vocab = host.array(target_n), logits_nV.shape[1]
    if (((target < 0) | (target >= vocab)) & (target != ignore_index)).any():
        raise IndexError(f"targets should be from 0 to {vocab - 1}, or {ignore_index}")
    loss_n = logits_nV.new_empty(len(logits_nV))
    host.over_rows(_less_maximum, logits_nV, target_n, ignore_index, loss_n)
    logits_nV.exp2_()
    host.over_rows(_finish, logits_nV, target_n, ignore_index, denominator, needs_grad, loss_n)
    return loss_n, logits_nV if needs_grad else None


@fused_loop
def _less_maximum(
    start: int, stop: int, logits: Array, target: Any, ignore_index: int, target_logit: Array
) -> None:
    """Makes logits base-2, less their row's maximum, and copies those of the targets."""
    vocab = logits.shape[1]
    whole = vocab // _LANES * _LANES
    tops = np.empty(_LANES, _F32)
    for n in range(start, stop):
        x = logits[n]
        for b in range(_LANES):  # 16 running maxima are one vector instruction
            tops[b] = -np.inf
        for first in range(0, whole, _LANES):
            for b in range(_LANES):
                tops[b] = x[first + b] if x[first + b] > tops[b] else tops[b]
        top = _F32(-np.inf)
        for b in range(_LANES):
            top = max(top, tops[b])
        for v in range(whole, vocab):
            top = max(top, x[v])
        for v in range(vocab):
            x[v] = (x[v] - top) * _F32(_LOG2E)
        target_logit[n] = _F32(0) if target[n] == ignore_index else x[target[n]]


@fused_loop
def _finish(
    start: int,
    stop: int,
    powers: Array,
    target: Any,
    ignore_index: int,
    denominator: float,
    needs_grad: bool,
    loss: Array,
) -> None:
    """Turns the targets' logits into losses, and powers into the logits' gradient."""
    vocab = powers.shape[1]
    for n in range(start, stop):
        x = powers[n]
        total = _F32(0)
        for v in range(vocab):
            total += x[v]
        is_valid = target[n] != ignore_index
        weight = _F32(1 / denominator) if is_valid else _F32(0)
        unit = _F32(1 / _LOG2E) if is_valid else _F32(0)  # a factor of 0 lets NaN through
        loss[n] = (_F32(math.log2(total)) - loss[n]) * unit
        if needs_grad:
            factor = weight / total
            for v in range(vocab):
                x[v] *= factor
            if is_valid:
                x[target[n]] -= weight
