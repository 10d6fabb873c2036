"""Core attention's gradients of keys and of entries in Triton.

Each program owns one block of keys and loops over the queries that see any of them; or owns one
block of a token's selected entries and loops over its heads. ``forward_triton.py`` has the plan and
the roofline bounds.

T queries; H heads; K their width (DIM); C entries; k selected entries of a query.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.attention.pairs_triton import add_pairs
from model.kernels.attention.parts_triton import (
    ENTRY_RANGE,
    FAR,
    Call,
    selected_tile,
    tile,
    transposed_dot,
)
from model.kernels.attention.query_gradient_triton import Rows
from model.kernels.attention.ranges import queries_of_blocks


@triton.jit
def _key_gradient_step(
    q_and_grad,
    k,
    visible,
    any_row,
    lse2,
    delta,
    acc,
    scale_log2,
    softmax_scale,
):
    """Adds dsᵀ · q + pᵀ · grad of this tile of queries to the gradient of keys k.

    ``q_and_grad`` [2·ROWS, DIM] alternates queries and output gradients: one matmul gives s and dp,
    another adds both products.
    """
    BLOCK_N: tl.constexpr = k.shape[0]
    ROWS: tl.constexpr = q_and_grad.shape[0] // 2
    x = transposed_dot(k, q_and_grad, any_row)
    s, dp = tl.split(tl.reshape(x, (BLOCK_N, ROWS, 2)))
    p = tl.exp2(tl.where(visible, s * scale_log2 - lse2[None, :], float("-inf")))
    ds = p * (dp - delta[None, :]) * softmax_scale
    weight = tl.reshape(tl.join(ds, p), (BLOCK_N, 2 * ROWS))
    return tl.dot(weight.to(q_and_grad.dtype), q_and_grad, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["count"])
def _grad_keys(
    q_and_grad,
    keys,
    start_T,
    end_T,
    query_start,
    query_end,
    lse2,
    delta,
    grad,
    count,
    heads,
    scale_log2,
    softmax_scale,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes the gradient of a block of keys from one of several equal parts of its queries.

    Its queries are those that see any of the keys. Writes fp32 [parts, count, DIM]; no two programs
    write the same element.
    """
    block, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile(keys, n, n < count, DIM)
    acc = tl.zeros((BLOCK_N, DIM), tl.float32)
    first = tl.load(query_start + block) * heads
    last = tl.load(query_end + block) * heads
    span = tl.cdiv(tl.cdiv(last - first, parts), ROWS) * ROWS
    end = tl.minimum(first + (part + 1) * span, last)
    for start in tl.range(first + part * span, end, ROWS):
        row = start + tl.arange(0, ROWS)
        in_bounds = row < end
        token = row // heads
        low = tl.load(start_T + token, mask=in_bounds, other=FAR)
        high = tl.load(end_T + token, mask=in_bounds, other=0)
        pair = 2 * start + tl.arange(0, 2 * ROWS)
        q_and_grad_tile = tile(q_and_grad, pair, pair < 2 * end, DIM)
        row_lse2 = tl.load(lse2 + row, mask=in_bounds, other=0.0)
        row_delta = tl.load(delta + row, mask=in_bounds, other=0.0)
        visible = (n[:, None] >= low[None, :]) & (n[:, None] < high[None, :])
        acc = _key_gradient_step(
            q_and_grad_tile,
            k,
            visible,
            start < end,
            row_lse2,
            row_delta,
            acc,
            scale_log2,
            softmax_scale,
        )
    at = (part.to(tl.int64) * count + n)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(grad + at, acc, mask=(n < count)[:, None])


@triton.jit(do_not_specialize=["first_token"])
def _grad_selected(
    q_and_grad,
    entries,
    selected,
    selected_end,
    lse2,
    delta,
    grad,
    first_token,
    heads,
    num_selected,
    scale_log2,
    softmax_scale,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """Computes the gradient of one token's selected entries [BLOCK_N], summed over its heads.

    Either adds it to the entries' gradient [C, DIM] by atomics, in any order, or writes one row for
    each (token, column) pair, [tokens · k, DIM], which ``add_pairs`` sums in a fixed order.
    """
    token = first_token + tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N
    stop = tl.load(selected_end + token)
    if column < stop:
        n = column + tl.arange(0, BLOCK_N)
        valid = n < stop
        entry, k = selected_tile(entries, selected, token, n, stop, num_selected, DIM)
        acc = tl.zeros((BLOCK_N, DIM), tl.float32)
        for start in tl.range(0, heads, ROWS):
            head = start + tl.arange(0, ROWS)
            in_bounds = head < heads
            row = token * heads + head
            pair = 2 * start + tl.arange(0, 2 * ROWS)
            q_and_grad_tile = tile(q_and_grad, 2 * token * heads + pair, pair < 2 * heads, DIM)
            row_lse2 = tl.load(lse2 + row, mask=in_bounds, other=0.0)
            row_delta = tl.load(delta + row, mask=in_bounds, other=0.0)
            visible = valid[:, None] & in_bounds[None, :]
            acc = _key_gradient_step(
                q_and_grad_tile,
                k,
                visible,
                start < heads,
                row_lse2,
                row_delta,
                acc,
                scale_log2,
                softmax_scale,
            )
        dim = tl.arange(0, DIM)[None, :]
        if ATOMIC:
            at = entry.to(tl.int64)[:, None] * DIM + dim
            tl.atomic_add(grad + at, acc, mask=valid[:, None], sem="relaxed")
        else:
            pair = tl.program_id(0).to(tl.int64) * num_selected + n
            at = grad + pair[:, None] * DIM + dim
            tl.store(at, acc.to(grad.dtype.element_ty), mask=valid[:, None])


def entry_gradients(
    call: Call, rows: Rows, entries: Tensor | None, deterministic: bool
) -> Tensor | None:
    """Returns the entries' gradient in their dtype.

    With selected entries the sum is in a fixed order if ``deterministic``, else atomic.
    """
    if entries is None:
        return None
    if call.mode == ENTRY_RANGE.value:
        sums = range_gradients(call, rows, entries, call.entry_start, call.entry_end, "entries")
    else:
        sums = _selected_gradients(call, rows, entries, deterministic)
    return sums.to(entries.dtype)


def range_gradients(
    call: Call, rows: Rows, keys: Tensor, start_T: Tensor, end_T: Tensor, name: Hashable
) -> Tensor:
    """Returns the fp32 gradient of keys, of which query t sees [start_T[t], end_T[t]).

    Neither bound decreases with t. `name` stands for the bounds among those of the call's ranges.
    """
    count, block = keys.shape[0], call.blocks.dk_keys
    if not count or not call.tokens:
        return torch.zeros_like(keys, dtype=torch.float32)

    def queries() -> tuple[Tensor, Tensor]:
        first_N = torch.arange(0, count, block, dtype=torch.int32, device=keys.device)
        return queries_of_blocks(first_N, block, start_T, end_T)

    key = "queries of blocks", name, count, block
    query_start, query_end = call.ranges.derived(key, queries)
    blocks = len(query_start)
    parts = max(call.blocks.programs // blocks, 1)
    parts = min(parts, triton.cdiv(call.tokens * call.heads, call.blocks.dk_rows))
    grad = torch.empty((parts, *keys.shape), dtype=torch.float32, device=keys.device)
    _grad_keys[(blocks, parts)](
        rows.q_and_grad,
        keys,
        start_T,
        end_T,
        query_start,
        query_end,
        rows.lse2,
        rows.delta,
        grad,
        count,
        call.heads,
        call.scale_log2,
        call.softmax_scale,
        DIM=call.dim,
        ROWS=call.blocks.dk_rows,
        BLOCK_N=block,
        **call.blocks.dk_options,
    )
    return grad.sum(0) if parts > 1 else grad[0]


def _selected_gradients(call: Call, rows: Rows, entries: Tensor, deterministic: bool) -> Tensor:
    """Returns the fp32 gradient of entries where each query attends to its selected ones.

    Queries that see at most k entries attend to all of them, so those need no lists: in rows of up
    to 2·k entries they have at least a third of all pairs.
    """
    assert call.selected is not None
    grad, count_T = _whole_range_gradients(call, rows, entries)
    row_bytes = call.dim * _pair_dtype(entries.dtype).itemsize
    chunk = call.tokens
    pairs = grad
    if deterministic:
        chunk = max(min(chunk, call.blocks.pair_bytes // (call.num_selected * row_bytes)), 1)
        shape = (chunk * call.num_selected, call.dim)
        pairs = grad.new_empty(shape, dtype=_pair_dtype(entries.dtype))
        column_k = torch.arange(call.num_selected, dtype=torch.int32, device=grad.device)
    for first in range(0, call.tokens, max(chunk, 1)):
        tokens = min(chunk, call.tokens - first)
        _grad_selected[(tokens, triton.cdiv(call.num_selected, call.blocks.dk_keys))](
            rows.q_and_grad,
            entries,
            call.selected,
            count_T,
            rows.lse2,
            rows.delta,
            pairs,
            first,
            call.heads,
            call.num_selected,
            call.scale_log2,
            call.softmax_scale,
            DIM=call.dim,
            ROWS=call.blocks.dk_rows,
            BLOCK_N=call.blocks.dk_keys,
            ATOMIC=not deterministic,
            **call.blocks.dk_options,
        )
        if deterministic:
            chosen = slice(first, first + tokens)
            written = column_k < count_T[chosen, None]
            add_pairs(pairs, call.selected[chosen].where(written, -1).flatten(), grad)
    return grad


def _whole_range_gradients(call: Call, rows: Rows, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the entries' fp32 gradient from queries that see at most k of them, with ranges.

    And the number of selected entries of each query whose gradients are not in it, int32 [T].
    """

    def few() -> tuple[Tensor, Tensor]:
        sees_few_T = call.visible_end - call.visible_start <= call.num_selected
        # An empty range of the other queries; the bounds do not decrease with them either, since
        # all entries of one sample come before those of the next.
        return sees_few_T, torch.where(sees_few_T, call.visible_start, call.visible_end)

    sees_few_T, start_T = call.ranges.derived(("sees few", call.num_selected), few)
    grad = range_gradients(
        call, rows, entries, start_T, call.visible_end, ("few entries", call.num_selected)
    )
    return grad, call.entry_end.masked_fill(sees_few_T, 0)


def _pair_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a (query, entry) pair's gradient, which is rounded once before the sum.

    fp16 has too small an exponent for it.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
