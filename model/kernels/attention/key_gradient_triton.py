"""Core attention's gradients of keys and of entries in Triton.

A program has a block of keys and passes over the queries that see one of them, or some selected
entries of one token and passes over its heads. ``forward_triton.py`` has the plan and the floors.

T queries; H heads; K their width (DIM); C entries; k selected entries of a query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.attention.pairs_triton import add_pairs
from model.kernels.attention.parts_triton import ENTRY_RANGE, FAR, Call, tile
from model.kernels.attention.query_gradient_triton import Rows
from model.kernels.attention.ranges import queries_of_blocks


@triton.jit
def _key_gradient_step(
    both, k, visible, lse2, delta, acc, scale, root, ROWS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Adds dsᵀ · q + pᵀ · grad, this tile of queries' share, to the gradient of keys k.

    ``both`` [2·ROWS, DIM] alternates queries and their gradients, so that each is one matmul.
    """
    x = tl.dot(k, tl.trans(both), input_precision="ieee")
    s, dp = tl.split(tl.reshape(x, (BLOCK_N, ROWS, 2)))
    p = tl.exp2(tl.where(visible, s * scale - lse2[None, :], float("-inf")))
    ds = p * (dp - delta[None, :]) * root
    weight = tl.reshape(tl.join(ds, p), (BLOCK_N, 2 * ROWS))
    return tl.dot(weight.to(both.dtype), both, acc, input_precision="ieee")


@triton.jit
def _grad_keys(
    both,
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
    scale,
    root,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys [BLOCK_N] against the queries that may see them, one of several equal parts of these.

    Written as fp32 [parts, count, DIM]; nothing is added to by two programs.
    """
    block, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile(keys, n, n < count, DIM)
    acc = tl.zeros((BLOCK_N, DIM), tl.float32)
    first = tl.load(query_start + block) * heads
    last = tl.load(query_end + block) * heads
    share = tl.cdiv(tl.cdiv(last - first, parts), ROWS) * ROWS
    end = tl.minimum(first + (part + 1) * share, last)
    for start in tl.range(first + part * share, end, ROWS):
        row = start + tl.arange(0, ROWS)
        live = row < end
        token = row // heads
        low = tl.load(start_T + token, mask=live, other=FAR)
        high = tl.load(end_T + token, mask=live, other=0)
        pair = 2 * start + tl.arange(0, 2 * ROWS)
        q_and_grad = tile(both, pair, pair < 2 * end, DIM)
        row_lse2 = tl.load(lse2 + row, mask=live, other=0.0)
        row_delta = tl.load(delta + row, mask=live, other=0.0)
        visible = (n[:, None] >= low[None, :]) & (n[:, None] < high[None, :])
        acc = _key_gradient_step(
            q_and_grad, k, visible, row_lse2, row_delta, acc, scale, root, ROWS, BLOCK_N
        )
    at = (part.to(tl.int64) * count + n)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(grad + at, acc, mask=(n < count)[:, None])


@triton.jit
def _grad_selected(
    both,
    entries,
    selected,
    lse2,
    delta,
    grad,
    first_token,
    heads,
    num_selected,
    scale,
    root,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """Multiplies one token's selected entries [BLOCK_N] with all its heads.

    Either added to the entries' gradient [C, DIM] by atomics, in any order, or written as a row
    for each pair (token, place), [tokens · k, DIM], which ``add_pairs`` adds up in order.
    """
    token = first_token + tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    entry = tl.load(
        selected + token.to(tl.int64) * num_selected + n, mask=n < num_selected, other=-1
    )
    if tl.max(entry, 0) >= 0:
        k = tile(entries, entry, entry >= 0, DIM)
        acc = tl.zeros((BLOCK_N, DIM), tl.float32)
        for start in tl.range(0, heads, ROWS):
            head = start + tl.arange(0, ROWS)
            live = head < heads
            row = token * heads + head
            pair = 2 * start + tl.arange(0, 2 * ROWS)
            q_and_grad = tile(both, 2 * token * heads + pair, pair < 2 * heads, DIM)
            row_lse2 = tl.load(lse2 + row, mask=live, other=0.0)
            row_delta = tl.load(delta + row, mask=live, other=0.0)
            visible = (entry >= 0)[:, None] & live[None, :]
            acc = _key_gradient_step(
                q_and_grad, k, visible, row_lse2, row_delta, acc, scale, root, ROWS, BLOCK_N
            )
        dim = tl.arange(0, DIM)[None, :]
        if ATOMIC:
            at = entry.to(tl.int64)[:, None] * DIM + dim
            tl.atomic_add(grad + at, acc, mask=(entry >= 0)[:, None], sem="relaxed")
        else:
            pair = tl.program_id(0).to(tl.int64) * num_selected + n
            tl.store(grad + pair[:, None] * DIM + dim, acc, mask=(entry >= 0)[:, None])


def entry_gradients(
    call: Call, rows: Rows, entries: Tensor | None, deterministic: bool
) -> Tensor | None:
    """Returns the entries' gradient in their dtype; lists are summed in a fixed order or in any."""
    if entries is None:
        return None
    if call.mode == ENTRY_RANGE:
        sums = range_gradients(call, rows, entries, call.entry_start, call.entry_end)
    else:
        sums = _selected_gradients(call, rows, entries, deterministic)
    return sums.to(entries.dtype)


def range_gradients(call: Call, rows: Rows, keys: Tensor, start_T: Tensor, end_T: Tensor) -> Tensor:
    """Returns the fp32 gradient of keys; query t sees start_T[t] to end_T[t], which only grow."""
    count, block = keys.shape[0], call.blocks.key_keys
    if not count or not call.tokens:
        return torch.zeros_like(keys, dtype=torch.float32)
    first = torch.arange(0, count, block, dtype=torch.int32, device=keys.device)
    query_start, query_end = queries_of_blocks(first, block, start_T, end_T)
    parts = max(call.blocks.programs // len(first), 1)
    parts = min(parts, triton.cdiv(call.tokens * call.heads, call.blocks.key_rows))
    grad = torch.empty((parts, *keys.shape), dtype=torch.float32, device=keys.device)
    _grad_keys[(len(first), parts)](
        rows.both,
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
        call.scale,
        call.root,
        DIM=call.dim,
        ROWS=call.blocks.key_rows,
        BLOCK_N=block,
        **call.blocks.options,
    )
    return grad.sum(0) if parts > 1 else grad[0]


def _selected_gradients(call: Call, rows: Rows, entries: Tensor, deterministic: bool) -> Tensor:
    """Returns the fp32 gradient of entries where every query sees its list."""
    grad = torch.zeros_like(entries, dtype=torch.float32)
    chunk = call.tokens
    if deterministic:
        chunk = max(min(chunk, call.blocks.pair_bytes // (4 * call.num_selected * call.dim)), 1)
        pairs = grad.new_empty(chunk * call.num_selected, call.dim)
    for first in range(0, call.tokens, max(chunk, 1)):
        tokens = min(chunk, call.tokens - first)
        _grad_selected[(tokens, triton.cdiv(call.num_selected, call.blocks.key_keys))](
            rows.both,
            entries,
            call.selected,
            rows.lse2,
            rows.delta,
            pairs if deterministic else grad,
            first,
            call.heads,
            call.num_selected,
            call.scale,
            call.root,
            DIM=call.dim,
            ROWS=call.blocks.key_rows,
            BLOCK_N=call.blocks.key_keys,
            ATOMIC=not deterministic,
            **call.blocks.options,
        )
        if deterministic:
            assert call.selected is not None
            add_pairs(pairs, call.selected[first : first + tokens].flatten(), grad)
    return grad
