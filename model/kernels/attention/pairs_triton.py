"""Sums of many rows by a row each belongs to, in a fixed order: the adjoint of a gather.

Gradients of entries that queries selected, of attention and of the indexer's objective: each
(query, place) pair's share has a separate row, and each entry adds up its pairs' in the order
of the queries, so that two runs agree bit for bit where atomics would not.

P pairs; C entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sum_pairs(pairs, order, bounds, grad, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Adds to one entry's gradient the rows of its pairs, in the order of the queries."""
    entry = tl.program_id(0)
    dim = tl.arange(0, DIM)
    first, last = tl.load(bounds + entry), tl.load(bounds + entry + 1)
    if last > first:
        acc = tl.zeros((DIM,), tl.float32)
        for start in tl.range(first, last, BLOCK):
            i = start + tl.arange(0, BLOCK)
            pair = tl.load(order + i, mask=i < last, other=0)
            at = pair.to(tl.int64)[:, None] * DIM + dim[None, :]
            acc += tl.sum(tl.load(pairs + at, mask=(i < last)[:, None], other=0.0), 0)
        at = grad + entry.to(tl.int64) * DIM + dim
        tl.store(at, tl.load(at) + acc)


def add_pairs(pairs: Tensor, entry_P: Tensor, grad: Tensor) -> None:
    """Adds row i of ``pairs`` to row entry_P[i] of ``grad``, for each row of grad in order of i.

    Args:
        pairs: fp32 [P, d] or more dims before d.
        entry_P: -1 where a row belongs to none.
        grad: fp32 [C, d].
    """
    entry_sorted, order = entry_P.sort(stable=True)
    rows = torch.arange(len(grad) + 1, dtype=torch.int32, device=grad.device)
    bounds = torch.searchsorted(entry_sorted, rows, out_int32=True)
    _sum_pairs[(len(grad),)](pairs, order, bounds, grad, DIM=grad.shape[1], BLOCK=16, num_warps=4)
