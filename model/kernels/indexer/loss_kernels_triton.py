"""Kernels of the indexer's objective; ``loss_triton.py`` has the plan and the floors.

T queries; I index heads (HEADS); J their width (DIM); C entries. A row is a pair (token, head).
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.kernels.indexer.kl_target import MIN_PROBABILITY_MASS
from model.kernels.indexer.select_triton import FAR, scored

_MIN_MASS = tl.constexpr(MIN_PROBABILITY_MASS)


@triton.jit
def _entries(
    at, low, high, selected, token, begin, width, BLOCK_N: tl.constexpr, LISTS: tl.constexpr
):
    """Entries of a step (-1: none) and their columns, [BLOCK_N]; visible to whom [T, BLOCK_N]."""
    if LISTS:
        column = at + tl.arange(0, BLOCK_N)
        place = token.to(tl.int64)[:, None] * width + column[None, :]
        listed = tl.load(selected + place, mask=(column < width)[None, :], other=-1)
        n = tl.max(listed, 0)  # a program has one token
        visible = listed >= 0
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
    LISTS: tl.constexpr,
):
    """Tokens, what each of them sees, rows (token, head), and the first and last place to read."""
    # The last tokens see the most entries and come first.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    token = program * BLOCK_T + tl.arange(0, BLOCK_T)
    row = program * BLOCK_T * HEADS + tl.arange(0, BLOCK_T * HEADS)
    low = tl.load(entry_start + token, mask=token < tokens, other=FAR)
    high = tl.load(entry_end + token, mask=token < tokens, other=0)
    first, end = tl.min(low, 0), tl.max(high, 0)
    if LISTS:
        first, end = 0, width
    return token, low, high, row, first, end


@triton.jit
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
    LISTS: tl.constexpr,
):
    token, low, high, row, first, end = _rows_of_program(
        entry_start, entry_end, tokens, width, BLOCK_T, HEADS, LISTS
    )
    dim = tl.arange(0, DIM)[None, :]
    in_rows = row < tokens * HEADS
    ready = tl.load(q + row.to(tl.int64)[:, None] * DIM + dim, mask=in_rows[:, None], other=0.0)
    weight = tl.load(weights + row, mask=in_rows, other=0.0).to(tl.float32)
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    sum_exp = tl.zeros((BLOCK_T,), tl.float32)
    sum_mass = tl.zeros((BLOCK_T,), tl.float32)
    cross = tl.zeros((BLOCK_T,), tl.float32)
    for at in tl.range(first, end, BLOCK_N):
        n, column, visible = _entries(at, low, high, selected, token, begin, width, BLOCK_N, LISTS)
        tile = tl.load(keys + n.to(tl.int64)[:, None] * DIM + dim, mask=(n >= 0)[:, None], other=0)
        _, scores = scored(ready, tile, weight, BLOCK_T, HEADS, BLOCK_N)
        place = token.to(tl.int64)[:, None] * width + column[None, :]
        m = tl.load(mass + place, mask=visible, other=0.0)
        m = tl.where(m < _MIN_MASS, 0.0, m)
        sum_mass += tl.sum(m, 1)
        cross += tl.sum(m * (tl.log(tl.where(m == 0.0, 1.0, m)) - scores), 1)
        scores = tl.where(visible, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        sum_exp = sum_exp * tl.exp(top - safe) + tl.sum(tl.exp(scores - safe[:, None]), 1)
        top = new
    row_lse = tl.where(sum_exp > 0.0, top + tl.log(tl.where(sum_exp > 0.0, sum_exp, 1.0)), 0.0)
    divisor = tl.where(sum_mass == 0.0, 1.0, sum_mass)
    divergence = tl.where(sum_mass == 0.0, 0.0, cross / divisor - tl.log(divisor) + row_lse)
    tl.store(loss + token, divergence, mask=token < tokens)
    tl.store(lse + token, row_lse, mask=token < tokens)
    tl.store(total + token, sum_mass, mask=token < tokens)


@triton.jit
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
    each,
    tokens,
    begin,
    width,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LISTS: tl.constexpr,
):
    """Gradients of queries and head weights; in ``each`` those of scores or of a list's keys."""
    token, low, high, row, first, end = _rows_of_program(
        entry_start, entry_end, tokens, width, BLOCK_T, HEADS, LISTS
    )
    dim = tl.arange(0, DIM)[None, :]
    in_rows = row < tokens * HEADS
    own = row.to(tl.int64)[:, None] * DIM + dim
    ready = tl.load(q + own, mask=in_rows[:, None], other=0.0)
    weight = tl.load(weights + row, mask=in_rows, other=0.0).to(tl.float32)
    row_lse = tl.load(lse + token, mask=token < tokens, other=0.0)
    sum_mass = tl.load(total + token, mask=token < tokens, other=0.0)
    factor = tl.load(grad + token, mask=token < tokens, other=0.0).to(tl.float32)
    factor = tl.where(sum_mass == 0.0, 0.0, factor)
    divisor = tl.where(sum_mass == 0.0, 1.0, sum_mass)
    acc = tl.zeros((BLOCK_T * HEADS, DIM), tl.float32)
    acc_weight = tl.zeros((BLOCK_T * HEADS,), tl.float32)
    for at in tl.range(first, end, BLOCK_N):
        n, column, visible = _entries(at, low, high, selected, token, begin, width, BLOCK_N, LISTS)
        tile = tl.load(keys + n.to(tl.int64)[:, None] * DIM + dim, mask=(n >= 0)[:, None], other=0)
        dots, scores = scored(ready, tile, weight, BLOCK_T, HEADS, BLOCK_N)
        place = token.to(tl.int64)[:, None] * width + column[None, :]
        m = tl.load(mass + place, mask=visible, other=0.0)
        target = tl.where(m < _MIN_MASS, 0.0, m) / divisor[:, None]
        share = tl.exp(tl.where(visible, scores - row_lse[:, None], float("-inf")))
        along = (share - target) * factor[:, None]
        spread = tl.broadcast_to(along[:, None, :], (BLOCK_T, HEADS, BLOCK_N))
        spread = tl.reshape(spread, (BLOCK_T * HEADS, BLOCK_N))
        acc_weight += tl.sum(dots * spread, 1)
        grad_dots = tl.where(dots > 0.0, spread * weight[:, None], 0.0).to(tile.dtype)
        acc = tl.dot(grad_dots, tile, acc, input_precision="ieee")
        if LISTS:
            of_keys = tl.dot(tl.trans(grad_dots), ready, input_precision="ieee")
            pair = tl.max(token, 0).to(tl.int64) * width + column
            tl.store(each + pair[:, None] * DIM + dim, of_keys, mask=(n >= 0)[:, None])
        else:
            tl.store(each + place, along, mask=visible)
    tl.store(grad_q + own, acc, mask=in_rows[:, None])
    tl.store(grad_weights + row, acc_weight, mask=in_rows)


@triton.jit
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
    """Gradient of a block of keys, by every num_programs(1)-th block of queries that see one."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = begin + column
    dim = tl.arange(0, DIM)[None, :]
    known = (column < width)[:, None]
    tile = tl.load(keys + n.to(tl.int64)[:, None] * DIM + dim, mask=known, other=0.0)
    first, last = tl.load(query_start + tl.program_id(0)), tl.load(query_end + tl.program_id(0))
    acc = tl.zeros((BLOCK_N, DIM), tl.float32)
    first += tl.program_id(1) * BLOCK_T
    for at in tl.range(first, last, tl.num_programs(1) * BLOCK_T):
        token = at + tl.arange(0, BLOCK_T)
        row = at * HEADS + tl.arange(0, BLOCK_T * HEADS)
        in_rows = row < tokens * HEADS
        ready = tl.load(q + row.to(tl.int64)[:, None] * DIM + dim, mask=in_rows[:, None], other=0.0)
        weight = tl.load(weights + row, mask=in_rows, other=0.0).to(tl.float32)
        low = tl.load(entry_start + token, mask=token < tokens, other=FAR)
        high = tl.load(entry_end + token, mask=token < tokens, other=0)
        visible = (n[:, None] >= low[None, :]) & (n[:, None] < high[None, :])
        place = token.to(tl.int64)[None, :] * width + column[:, None]
        along = tl.load(grad_scores + place, mask=visible, other=0.0)
        spread = tl.broadcast_to(along[:, :, None], (BLOCK_N, BLOCK_T, HEADS))
        spread = tl.reshape(spread, (BLOCK_N, BLOCK_T * HEADS))
        dots = tl.dot(tile, tl.trans(ready), input_precision="ieee")
        grad_dots = tl.where(dots > 0.0, spread * weight[None, :], 0.0).to(tile.dtype)
        acc = tl.dot(grad_dots, ready, acc, input_precision="ieee")
    out = grad + (tl.program_id(1).to(tl.int64) * width + column)[:, None] * DIM + dim
    tl.store(out, acc, mask=known)
