"""Deterministic segment sum (index_add in a fixed order): the adjoint of a gather.

Used for the gradients of selected entries in attention and in the indexer's objective: each
(query, column) pair's gradient is a separate row, and each entry sums its pairs' rows in the order
of the queries, so that two runs agree bit for bit where atomics would not.

P (query, column) pairs; C entries; d row width (DIM).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sum_pairs(pairs, order, bounds, grad, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the rows of one entry's pairs to its gradient, in the order of the queries."""
    entry = tl.program_id(0)
    dim = tl.arange(0, DIM)
    first, last = tl.load(bounds + entry), tl.load(bounds + entry + 1)
    if last > first:
        acc = tl.zeros((DIM,), tl.float32)
        for start in tl.range(first, last, BLOCK):
            i = start + tl.arange(0, BLOCK)
            pair = tl.load(order + i, mask=i < last, other=0)
            at = pair.to(tl.int64)[:, None] * DIM + dim[None, :]
            terms = tl.load(pairs + at, mask=(i < last)[:, None], other=0.0)
            acc += tl.sum(terms.to(tl.float32), 0)
        at = grad + entry.to(tl.int64) * DIM + dim
        tl.store(at, tl.load(at) + acc)


def add_pairs(pairs: Tensor, entry_P: Tensor, grad: Tensor) -> None:
    """Adds row i of ``pairs`` to row entry_P[i] of ``grad``, for each row of grad in order of i.

    Args:
        pairs: [..., d] with P rows, in any float dtype; summed in fp32.
        entry_P: the row of ``grad`` that each row of ``pairs`` is added to, -1 for none.
        grad: fp32 [C, d].
    """
    entry_sorted, order = entry_P.sort(stable=True)
    rows = torch.arange(len(grad) + 1, dtype=torch.int32, device=grad.device)
    bounds = torch.searchsorted(entry_sorted, rows, out_int32=True)
    _sum_pairs[(len(grad),)](pairs, order, bounds, grad, DIM=grad.shape[1], BLOCK=16, num_warps=4)
