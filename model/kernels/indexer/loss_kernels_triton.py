"""Kernels of the indexer's objective; ``loss_triton.py`` has the plan and the roofline bounds.

T queries; I index heads (HEADS); J their width (DIM); C entries. A row is a (token, head) pair.
SELECTED: whether the target is over selected entries; else each query sees a range.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.kernels.indexer.kl_target import MIN_PROBABILITY_MASS
from model.kernels.indexer.select_triton import FAR, scored

_MIN_MASS = tl.constexpr(MIN_PROBABILITY_MASS)


@triton.jit
def _entries(
    at, low, high, selected, token, begin, width, BLOCK_N: tl.constexpr, SELECTED: tl.constexpr
):
    """Returns a step's entries (-1: none) and columns, [BLOCK_N], and the visibility mask.

    The mask is [T, BLOCK_N].
    """
    if SELECTED:
        column = at + tl.arange(0, BLOCK_N)
        pair_index = token.to(tl.int64)[:, None] * width + column[None, :]
        entry = tl.load(selected + pair_index, mask=(column < width)[None, :], other=-1)
        n = tl.max(entry, 0)  # a program has one token
        visible = entry >= 0
    else:
        n = at + tl.arange(0, BLOCK_N)
        column = n - begin
        visible = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
        n = tl.where(column < width, n, -1)
    return n, column, visible


@triton.jit
def _rows_of_program(
    entry_start,
    entry_end,
    tokens,
    width,
    BLOCK_T: tl.constexpr,
    HEADS: tl.constexpr,
    SELECTED: tl.constexpr,
):
    """Returns token indices, their entry ranges, row indices, and the bounds of the entry loop."""
    # The last tokens see the most entries and come first.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    token = program * BLOCK_T + tl.arange(0, BLOCK_T)
    row = program * BLOCK_T * HEADS + tl.arange(0, BLOCK_T * HEADS)
    low = tl.load(entry_start + token, mask=token < tokens, other=FAR)
    high = tl.load(entry_end + token, mask=token < tokens, other=0)
    first, end = tl.min(low, 0), tl.max(high, 0)
    if SELECTED:
        first, end = 0, width
    return token, low, high, row, first, end


@triton.jit(do_not_specialize=["tokens", "begin", "width"])
def forward(
    q,
    keys,
    weights,
    selected,
    mass,
    entry_start,
    entry_end,
    loss,
    lse,
    total,
    tokens,
    begin,
    width,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SELECTED: tl.constexpr,
):
    token, low, high, row, first, end = _rows_of_program(
        entry_start, entry_end, tokens, width, BLOCK_T, HEADS, SELECTED
    )
    dim = tl.arange(0, DIM)[None, :]
    in_rows = row < tokens * HEADS
    q_tile = tl.load(q + row.to(tl.int64)[:, None] * DIM + dim, mask=in_rows[:, None], other=0.0)
    weight = tl.load(weights + row, mask=in_rows, other=0.0).to(tl.float32)
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    sum_exp = tl.zeros((BLOCK_T,), tl.float32)
    sum_mass = tl.zeros((BLOCK_T,), tl.float32)
    sum_kl = tl.zeros((BLOCK_T,), tl.float32)
    for at in tl.range(first, end, BLOCK_N):
        n, column, visible = _entries(
            at, low, high, selected, token, begin, width, BLOCK_N, SELECTED
        )
        tile = tl.load(keys + n.to(tl.int64)[:, None] * DIM + dim, mask=(n >= 0)[:, None], other=0)
        _, scores = scored(q_tile, tile, weight, BLOCK_T, HEADS, BLOCK_N)
        pair_index = token.to(tl.int64)[:, None] * width + column[None, :]
        m = tl.load(mass + pair_index, mask=visible, other=0.0)
        m = tl.where(m < _MIN_MASS, 0.0, m)
        sum_mass += tl.sum(m, 1)
        sum_kl += tl.sum(m * (tl.log(tl.where(m == 0.0, 1.0, m)) - scores), 1)
        scores = tl.where(visible, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        sum_exp = sum_exp * tl.exp(top - safe) + tl.sum(tl.exp(scores - safe[:, None]), 1)
        top = new
    row_lse = tl.where(sum_exp > 0.0, top + tl.log(tl.where(sum_exp > 0.0, sum_exp, 1.0)), 0.0)
    divisor = tl.where(sum_mass == 0.0, 1.0, sum_mass)
    divergence = tl.where(sum_mass == 0.0, 0.0, sum_kl / divisor - tl.log(divisor) + row_lse)
    tl.store(loss + token, divergence, mask=token < tokens)
    tl.store(lse + token, row_lse, mask=token < tokens)
    tl.store(total + token, sum_mass, mask=token < tokens)


@triton.jit(do_not_specialize=["tokens", "begin", "width"])
def grad_queries(
    q,
    keys,
    weights,
    selected,
    mass,
    entry_start,
    entry_end,
    lse,
    total,
    grad,
    grad_q,
    grad_weights,
    grad_pairs,
    tokens,
    begin,
    width,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SELECTED: tl.constexpr,
):
    """Computes the gradients of queries and head weights.

    Writes to ``grad_pairs`` the gradient of every score, or with SELECTED that of the key of every
    (query, column) pair.
    """
    token, low, high, row, first, end = _rows_of_program(
        entry_start, entry_end, tokens, width, BLOCK_T, HEADS, SELECTED
    )
    dim = tl.arange(0, DIM)[None, :]
    in_rows = row < tokens * HEADS
    own = row.to(tl.int64)[:, None] * DIM + dim
    q_tile = tl.load(q + own, mask=in_rows[:, None], other=0.0)
    weight = tl.load(weights + row, mask=in_rows, other=0.0).to(tl.float32)
    row_lse = tl.load(lse + token, mask=token < tokens, other=0.0)
    sum_mass = tl.load(total + token, mask=token < tokens, other=0.0)
    factor = tl.load(grad + token, mask=token < tokens, other=0.0).to(tl.float32)
    factor = tl.where(sum_mass == 0.0, 0.0, factor)
    divisor = tl.where(sum_mass == 0.0, 1.0, sum_mass)
    acc = tl.zeros((BLOCK_T * HEADS, DIM), tl.float32)
    acc_weight = tl.zeros((BLOCK_T * HEADS,), tl.float32)
    for at in tl.range(first, end, BLOCK_N):
        n, column, visible = _entries(
            at, low, high, selected, token, begin, width, BLOCK_N, SELECTED
        )
        tile = tl.load(keys + n.to(tl.int64)[:, None] * DIM + dim, mask=(n >= 0)[:, None], other=0)
        dots, scores = scored(q_tile, tile, weight, BLOCK_T, HEADS, BLOCK_N)
        pair_index = token.to(tl.int64)[:, None] * width + column[None, :]
        m = tl.load(mass + pair_index, mask=visible, other=0.0)
        target = tl.where(m < _MIN_MASS, 0.0, m) / divisor[:, None]
        p = tl.exp(tl.where(visible, scores - row_lse[:, None], float("-inf")))
        grad_scores = (p - target) * factor[:, None]
        grad_by_head = tl.broadcast_to(grad_scores[:, None, :], (BLOCK_T, HEADS, BLOCK_N))
        grad_by_head = tl.reshape(grad_by_head, (BLOCK_T * HEADS, BLOCK_N))
        acc_weight += tl.sum(dots * grad_by_head, 1)
        grad_dots = tl.where(dots > 0.0, grad_by_head * weight[:, None], 0.0).to(tile.dtype)
        acc = tl.dot(grad_dots, tile, acc, input_precision="ieee")
        if SELECTED:
            grad_k = tl.dot(tl.trans(grad_dots), q_tile, input_precision="ieee")
            pair = tl.max(token, 0).to(tl.int64) * width + column
            tl.store(grad_pairs + pair[:, None] * DIM + dim, grad_k, mask=(n >= 0)[:, None])
        else:
            tl.store(grad_pairs + pair_index, grad_scores, mask=visible)
    tl.store(grad_q + own, acc, mask=in_rows[:, None])
    tl.store(grad_weights + row, acc_weight, mask=in_rows)


@triton.jit(do_not_specialize=["tokens", "begin", "width"])
def grad_keys(
    q,
    keys,
    weights,
    grad_scores,
    entry_start,
    entry_end,
    query_start,
    query_end,
    grad,
    tokens,
    begin,
    width,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes the gradient of a block of keys from every num_programs(1)-th block of queries.

    These are the queries that see any of the keys.
    """
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = begin + column
    dim = tl.arange(0, DIM)[None, :]
    in_width = (column < width)[:, None]
    tile = tl.load(keys + n.to(tl.int64)[:, None] * DIM + dim, mask=in_width, other=0.0)
    first, last = tl.load(query_start + tl.program_id(0)), tl.load(query_end + tl.program_id(0))
    acc = tl.zeros((BLOCK_N, DIM), tl.float32)
    first += tl.program_id(1) * BLOCK_T
    for at in tl.range(first, last, tl.num_programs(1) * BLOCK_T):
        token = at + tl.arange(0, BLOCK_T)
        row = at * HEADS + tl.arange(0, BLOCK_T * HEADS)
        in_rows = row < tokens * HEADS
        q_tile = tl.load(
            q + row.to(tl.int64)[:, None] * DIM + dim, mask=in_rows[:, None], other=0.0
        )
        weight = tl.load(weights + row, mask=in_rows, other=0.0).to(tl.float32)
        low = tl.load(entry_start + token, mask=token < tokens, other=FAR)
        high = tl.load(entry_end + token, mask=token < tokens, other=0)
        visible = (n[:, None] >= low[None, :]) & (n[:, None] < high[None, :])
        pair_index = token.to(tl.int64)[None, :] * width + column[:, None]
        grad_tile = tl.load(grad_scores + pair_index, mask=visible, other=0.0)
        grad_by_head = tl.broadcast_to(grad_tile[:, :, None], (BLOCK_N, BLOCK_T, HEADS))
        grad_by_head = tl.reshape(grad_by_head, (BLOCK_N, BLOCK_T * HEADS))
        dots = tl.dot(tile, tl.trans(q_tile), input_precision="ieee")
        grad_dots = tl.where(dots > 0.0, grad_by_head * weight[None, :], 0.0).to(tile.dtype)
        acc = tl.dot(grad_dots, q_tile, acc, input_precision="ieee")
    out = grad + (tl.program_id(1).to(tl.int64) * width + column)[:, None] * DIM + dim
    tl.store(out, acc, mask=in_width)
