"""Core attention's gradients of keys and of entries in Triton.

A program has a block of keys and passes over the queries that see one of them, or some picks of one
token and passes over its heads. ``attention_triton.py`` has the plan and the floors.
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
    both, k, visible, lse2, along, acc, scale, root, ROWS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Adds dsᵀ · q + pᵀ · grad, this tile of queries' share, to the gradient of keys k.

    ``both`` [2·ROWS, DIM] alternates queries and their gradients, so that each is one product.
    """
    x = tl.dot(k, tl.trans(both), input_precision="ieee")
    s, dp = tl.split(tl.reshape(x, (BLOCK_N, ROWS, 2)))
    p = tl.exp2(tl.where(visible, s * scale - lse2[None, :], float("-inf")))
    ds = p * (dp - along[None, :]) * root
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
    along,
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
        row_along = tl.load(along + row, mask=live, other=0.0)
        visible = (n[:, None] >= low[None, :]) & (n[:, None] < high[None, :])
        acc = _key_gradient_step(
            q_and_grad, k, visible, row_lse2, row_along, acc, scale, root, ROWS, BLOCK_N
        )
    at = (part.to(tl.int64) * count + n)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(grad + at, acc, mask=(n < count)[:, None])


@triton.jit
def _grad_selected(
    both,
    entries,
    picked,
    lse2,
    along,
    grad,
    first_token,
    heads,
    picks,
    scale,
    root,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """One token's picks [BLOCK_N] against all its heads.

    Either added to the entries' gradient [C, DIM] by atomics, in any order, or written as a row
    for each pair (token, pick), [tokens · picks, DIM], which ``add_pairs`` adds up in order.
    """
    token = first_token + tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    entry = tl.load(picked + token.to(tl.int64) * picks + n, mask=n < picks, other=-1)
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
            row_along = tl.load(along + row, mask=live, other=0.0)
            visible = (entry >= 0)[:, None] & live[None, :]
            acc = _key_gradient_step(
                q_and_grad, k, visible, row_lse2, row_along, acc, scale, root, ROWS, BLOCK_N
            )
        dim = tl.arange(0, DIM)[None, :]
        if ATOMIC:
            at = entry.to(tl.int64)[:, None] * DIM + dim
            tl.atomic_add(grad + at, acc, mask=(entry >= 0)[:, None], sem="relaxed")
        else:
            pair = tl.program_id(0).to(tl.int64) * picks + n
            tl.store(grad + pair[:, None] * DIM + dim, acc, mask=(entry >= 0)[:, None])


def entry_gradients(
    call: Call, rows: Rows, entries: Tensor | None, deterministic: bool
) -> Tensor | None:
    """Of the entries, in their dtype; with lists in a fixed order or, faster, in any."""
    if entries is None:
        return None
    if call.mode == ENTRY_RANGE:
        sums = range_gradients(call, rows, entries, call.entry_start, call.entry_end)
    else:
        sums = _selected_gradients(call, rows, entries, deterministic)
    return sums.to(entries.dtype)


def range_gradients(call: Call, rows: Rows, keys: Tensor, start_T: Tensor, end_T: Tensor) -> Tensor:
    """fp32 gradient of keys that query t sees from start_T[t] to end_T[t]; both only grow."""
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
        rows.along,
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
    """fp32 gradient of entries of which every query sees its list."""
    grad = torch.zeros_like(entries, dtype=torch.float32)
    chunk = call.tokens
    if deterministic:
        chunk = max(min(chunk, call.blocks.pair_bytes // (4 * call.picks * call.dim)), 1)
        pairs = grad.new_empty(chunk * call.picks, call.dim)
    for first in range(0, call.tokens, max(chunk, 1)):
        tokens = min(chunk, call.tokens - first)
        _grad_selected[(tokens, triton.cdiv(call.picks, call.blocks.key_keys))](
            rows.both,
            entries,
            call.picked,
            rows.lse2,
            rows.along,
            pairs if deterministic else grad,
            first,
            call.heads,
            call.picks,
            call.scale,
            call.root,
            DIM=call.dim,
            ROWS=call.blocks.key_rows,
            BLOCK_N=call.blocks.key_keys,
            ATOMIC=not deterministic,
            **call.blocks.options,
        )
        if deterministic:
            assert call.picked is not None
            add_pairs(pairs, call.picked[first : first + tokens].flatten(), grad)
    return grad
