"""Core attention's gradient of the queries in Triton, and what the keys' gradient shares with it.

A first kernel prepares every query and its output's gradient once for all readers; the second
has a block of queries, as forward has, and passes over their keys. ``forward_triton.py`` has the
plan and the floors.

T queries; H heads; K their width (DIM); R rotated dims (ROTARY).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.attention.parts_triton import (
    Blocks,
    Call,
    bounds,
    range_tile,
    ready_queries,
    rows_of_program,
    selected_tile,
    tile,
)
from model.kernels.norm.rotation_triton import turned


@triton.jit
def _prepare(
    q,
    out,
    grad_out,
    rotation,
    both,
    rstd,
    delta,
    rows,
    heads,
    eps,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Writes of every row the ready query, its output's rotated gradient, 1 / rms and Σ g · o."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    token = row // heads
    at = row.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    x, r = ready_queries(q, rotation, row, token, live, eps, ROWS, DIM, ROTARY)
    pair = 2 * row.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(both + pair, x.to(both.dtype.element_ty), mask=live[:, None])
    tl.store(rstd + row, r, mask=live)
    grad = tl.load(grad_out + at, mask=live[:, None], other=0.0).to(tl.float32)
    o = tl.load(out + at, mask=live[:, None], other=0.0).to(tl.float32)
    tl.store(delta + row, tl.sum(grad * o, 1), mask=live)
    grad = turned(grad, rotation, token, live, 1.0, ROWS, DIM, DIM, ROTARY)
    tl.store(both + pair + DIM, grad.to(both.dtype.element_ty), mask=live[:, None])


@dataclass(frozen=True)
class Rows:
    """Backward's view of the queries.

    Attributes:
        both: [T, H, 2, K], each ready query and the gradient of its output, rotated alike.
        rstd, lse2, delta: [T, H]; delta is Σ grad · out.
    """

    both: Tensor
    rstd: Tensor
    lse2: Tensor
    delta: Tensor


def prepared(
    q: Tensor, out: Tensor, grad: Tensor, angles: Tensor, lse2: Tensor, eps: float, blocks: Blocks
) -> Rows:
    """Prepares what both gradients read from q [T, H, K], out and its gradient; all contiguous."""
    rows = Rows(
        q.new_empty(*q.shape[:2], 2, q.shape[2]),
        torch.empty_like(lse2),
        lse2,
        torch.empty_like(lse2),
    )
    count, block = lse2.numel(), min(16, blocks.rows)
    if count:
        _prepare[(triton.cdiv(count, block),)](
            q,
            out,
            grad,
            angles,
            rows.both,
            rows.rstd,
            rows.delta,
            count,
            q.shape[1],
            eps,
            DIM=q.shape[2],
            ROTARY=angles.shape[1],
            ROWS=block,
            num_warps=blocks.warps // 2,
        )
    return rows


@triton.jit
def _query_gradient_step(
    both, k, visible, lse2, delta, acc, scale, ROWS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Adds this tile's ds · k to the gradient of the ready queries.

    ``both`` [2·ROWS, DIM] alternates queries and their gradients: one matmul gives s and dp.
    """
    x = tl.dot(both, tl.trans(k), input_precision="ieee")
    s, dp = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, BLOCK_N)), (0, 2, 1)))
    p = tl.exp2(tl.where(visible, s * scale - lse2[:, None], float("-inf")))
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")


@triton.jit
def _query_gradient_over_range(
    both,
    keys,
    low_T,
    high_T,
    token,
    live,
    lse2,
    delta,
    acc,
    scale,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the same for all keys that each row sees, from low_T to high_T."""
    low, high, first, end = bounds(low_T, high_T, token, live)
    for start in tl.range(first, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k, visible = range_tile(keys, n, low, high, end, DIM)
        acc = _query_gradient_step(both, k, visible, lse2, delta, acc, scale, ROWS, BLOCK_N)
    return acc


@triton.jit
def _pairs_of_program(tokens, heads, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """Returns the same rows in an array of two for each: [2 · BLOCK_T · BLOCK_H] and live."""
    head_blocks = tl.cdiv(heads, BLOCK_H)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    place = tl.arange(0, 2 * BLOCK_T * BLOCK_H)
    token = program // head_blocks * BLOCK_T + place // (2 * BLOCK_H)
    head = program % head_blocks * BLOCK_H + place // 2 % BLOCK_H
    return 2 * (token * heads + head) + place % 2, (token < tokens) & (head < heads)


@triton.jit
def _grad_queries(
    both,
    keys,
    entries,
    selected,
    rotation,
    key_start,
    key_end,
    entry_start,
    entry_end,
    rstd,
    lse2,
    delta,
    grad_q,
    tokens,
    heads,
    num_selected,
    scale,
    root,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MODE: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCK_T * BLOCK_H
    token, _, row, live = rows_of_program(tokens, heads, BLOCK_T, BLOCK_H)
    pair, pair_live = _pairs_of_program(tokens, heads, BLOCK_T, BLOCK_H)
    q_and_grad = tile(both, pair, pair_live, DIM)
    row_lse2 = tl.load(lse2 + row, mask=live, other=0.0)
    row_delta = tl.load(delta + row, mask=live, other=0.0)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    acc = _query_gradient_over_range(
        q_and_grad,
        keys,
        key_start,
        key_end,
        token,
        live,
        row_lse2,
        row_delta,
        acc,
        scale,
        DIM,
        ROWS,
        BLOCK_N,
    )
    if MODE == 1:
        acc = _query_gradient_over_range(
            q_and_grad,
            entries,
            entry_start,
            entry_end,
            token,
            live,
            row_lse2,
            row_delta,
            acc,
            scale,
            DIM,
            ROWS,
            BLOCK_N,
        )
    if MODE == 2:
        one = tl.min(tl.where(live, token, tokens), 0)
        for start in tl.range(0, tl.load(entry_end + one), BLOCK_N):
            place = start + tl.arange(0, BLOCK_N)
            entry, k = selected_tile(entries, selected, one, place, num_selected, DIM)
            visible = (entry >= 0)[None, :]
            acc = _query_gradient_step(
                q_and_grad, k, visible, row_lse2, row_delta, acc, scale, ROWS, BLOCK_N
            )
    # Back through the rotation and the norm, whose output is q, read again to spare registers.
    acc = acc * root
    q = tile(both, 2 * row, live, DIM).to(tl.float32)
    acc -= q * (tl.sum(acc * q, 1) / DIM)[:, None]
    acc = turned(acc, rotation, token, live, -1.0, ROWS, DIM, DIM, ROTARY)
    acc *= tl.load(rstd + row, mask=live, other=0.0)[:, None]
    at = row.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(grad_q + at, acc.to(grad_q.dtype.element_ty), mask=live[:, None])


def query_gradients(
    call: Call, rows: Rows, q: Tensor, kv: Tensor, entries: Tensor | None, angles: Tensor
) -> Tensor:
    """Returns the gradient of q before its norm and rotation, in its dtype."""
    grad_q = torch.empty_like(q)
    block_t, block_h = call.rows(call.blocks.grad_rows)
    if grad_q.numel():
        _grad_queries[call.grid(block_t, block_h)](
            rows.both,
            kv,
            entries,
            call.selected,
            angles,
            *call.visible,
            rows.rstd,
            rows.lse2,
            rows.delta,
            grad_q,
            call.tokens,
            call.heads,
            call.num_selected,
            call.scale,
            call.root,
            DIM=call.dim,
            ROTARY=angles.shape[1],
            BLOCK_T=block_t,
            BLOCK_H=block_h,
            BLOCK_N=call.blocks.grad_keys,
            MODE=call.mode,
            **call.blocks.options,
        )
    return grad_q
