"""Core attention's gradient of the queries in Triton, and what the keys' gradient shares with it.

A first kernel prepares every query and its output's gradient once for all kernels that read them.
In the second, a program owns a block of queries, as in forward, and loops over their keys.
``forward_triton.py`` has the plan and the roofline bounds.

T queries; H heads; K their width (DIM); R rotary dims (ROTARY).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.attention.parts_triton import (
    ENTRY_RANGE,
    LOG2E,
    SELECTED_ENTRIES,
    Blocks,
    Call,
    bounds,
    load_queries,
    range_tile,
    rows_of_program,
    selected_stages,
    selected_tile,
    tile,
    transposed_dot,
)
from model.kernels.norm.rotation_triton import rotate_pairs

_LOG2E = tl.constexpr(LOG2E)


@triton.jit(do_not_specialize=["rows"])
def _prepare(
    q,
    out,
    grad_out,
    sink,
    lse2,
    cos_sin,
    q_and_grad,
    rstd,
    delta,
    grad_sink,
    rows,
    heads,
    eps,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Prepares every row for backward.

    Writes the normed and rotated query, the rotated output gradient, 1 / rms,
    delta = Σ grad_out · out, and the row's term of the sink's gradient, -p · delta with the sink's
    probability p.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_bounds = row < rows
    token = row // heads
    at = row.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    x, r = load_queries(q, cos_sin, row, token, in_bounds, eps, ROWS, DIM, ROTARY)
    pair = 2 * row.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(q_and_grad + pair, x.to(q_and_grad.dtype.element_ty), mask=in_bounds[:, None])
    tl.store(rstd + row, r, mask=in_bounds)
    grad = tl.load(grad_out + at, mask=in_bounds[:, None], other=0.0).to(tl.float32)
    o = tl.load(out + at, mask=in_bounds[:, None], other=0.0).to(tl.float32)
    sums = tl.sum(grad * o, 1)
    tl.store(delta + row, sums, mask=in_bounds)
    sink_logit = tl.load(sink + row % heads, mask=in_bounds, other=0.0).to(tl.float32) * _LOG2E
    row_lse2 = tl.load(lse2 + row, mask=in_bounds, other=0.0)
    tl.store(grad_sink + row, -tl.exp2(sink_logit - row_lse2) * sums, mask=in_bounds)
    grad = rotate_pairs(grad, cos_sin, token, in_bounds, 1.0, ROWS, DIM, DIM, ROTARY)
    tl.store(q_and_grad + pair + DIM, grad.to(q_and_grad.dtype.element_ty), mask=in_bounds[:, None])


@dataclass(frozen=True)
class Rows:
    """Per-(token, head) tensors that both backward kernels read.

    Attributes:
        q_and_grad: [T, H, 2, K], each normed, rotated query and the gradient of its output, rotated
            by the same angle.
        rstd, lse2, delta: [T, H]; delta is Σ grad_out · out.
        grad_sink: fp32 [T, H], each row's term of the sink's gradient.
    """

    q_and_grad: Tensor
    rstd: Tensor
    lse2: Tensor
    delta: Tensor
    grad_sink: Tensor


def prepare_rows(
    q: Tensor,
    out: Tensor,
    grad: Tensor,
    sink: Tensor,
    cos_sin: Tensor,
    lse2: Tensor,
    eps: float,
    blocks: Blocks,
) -> Rows:
    """Prepares what all gradients read from q [T, H, K], out and grad_out, all contiguous."""
    pairs = q.new_empty(*q.shape[:2], 2, q.shape[2])
    rstd, delta, grad_sink = (torch.empty_like(lse2) for _ in range(3))
    rows = Rows(pairs, rstd, lse2, delta, grad_sink)
    count, block = lse2.numel(), min(16, blocks.rows)
    if count:
        _prepare[(triton.cdiv(count, block),)](
            q,
            out,
            grad,
            sink.contiguous(),
            lse2,
            cos_sin,
            rows.q_and_grad,
            rows.rstd,
            rows.delta,
            rows.grad_sink,
            count,
            q.shape[1],
            eps,
            DIM=q.shape[2],
            ROTARY=cos_sin.shape[1],
            ROWS=block,
            num_warps=blocks.warps // 2,
        )
    return rows


@triton.jit
def _query_gradient_step(q_and_grad, k, visible, any_key, lse2, delta, acc, scale_log2):
    """Adds this tile's ds · k to the gradient of the normed, rotated queries.

    ``q_and_grad`` [2·ROWS, DIM] alternates queries and their gradients: one matmul gives s and dp.
    """
    x = transposed_dot(q_and_grad, k, any_key)
    x = tl.reshape(x, (acc.shape[0], 2, k.shape[0]))
    s, dp = tl.split(tl.permute(x, (0, 2, 1)))
    p = tl.exp2(tl.where(visible, s * scale_log2 - lse2[:, None], float("-inf")))
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")


@triton.jit
def _query_gradient_over_range(
    x, keys, low_T, high_T, token, in_bounds, lse2, delta, acc, scale_log2, BLOCK_N: tl.constexpr
):
    """Runs `_query_gradient_step` over all keys in each row's range [low_T, high_T).

    x are its ``q_and_grad``.
    """
    low, high, first, end = bounds(low_T, high_T, token, in_bounds)
    for start in tl.range(first, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k, visible = range_tile(keys, n, low, high, end, x.shape[1])
        acc = _query_gradient_step(x, k, visible, start < end, lse2, delta, acc, scale_log2)
    return acc


@triton.jit
def _query_gradient_over_list(
    x,
    entries,
    selected,
    num_selected,
    token,
    stop,
    lse2,
    delta,
    acc,
    scale_log2,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Runs `_query_gradient_step` over the first ``stop`` selected entries of one token."""
    for start in tl.range(0, stop, BLOCK_N, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_N)
        _, k = selected_tile(entries, selected, token, column, stop, num_selected, x.shape[1])
        visible = (column < stop)[None, :]
        acc = _query_gradient_step(x, k, visible, start < stop, lse2, delta, acc, scale_log2)
    return acc


@triton.jit
def _pairs_of_program(tokens, heads, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """Returns row indices into ``q_and_grad``, where query and gradient alternate.

    [2 · BLOCK_T · BLOCK_H], with their in-bounds mask.
    """
    head_blocks = tl.cdiv(heads, BLOCK_H)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    index = tl.arange(0, 2 * BLOCK_T * BLOCK_H)
    token = program // head_blocks * BLOCK_T + index // (2 * BLOCK_H)
    head = program % head_blocks * BLOCK_H + index // 2 % BLOCK_H
    return 2 * (token * heads + head) + index % 2, (token < tokens) & (head < heads)


@triton.jit(do_not_specialize=["tokens"])
def _grad_queries(
    q_and_grad,
    keys,
    entries,
    selected,
    cos_sin,
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
    scale_log2,
    softmax_scale,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MODE: tl.constexpr,
    SELECTED_STAGES: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCK_T * BLOCK_H
    token, _head, row, in_bounds = rows_of_program(tokens, heads, BLOCK_T, BLOCK_H)
    pair, pair_in_bounds = _pairs_of_program(tokens, heads, BLOCK_T, BLOCK_H)
    x = tile(q_and_grad, pair, pair_in_bounds, DIM)
    lse2_R = tl.load(lse2 + row, mask=in_bounds, other=0.0)
    delta_R = tl.load(delta + row, mask=in_bounds, other=0.0)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    low, high = key_start, key_end
    acc = _query_gradient_over_range(
        x, keys, low, high, token, in_bounds, lse2_R, delta_R, acc, scale_log2, BLOCK_N
    )
    if MODE == ENTRY_RANGE:
        low, high = entry_start, entry_end
        acc = _query_gradient_over_range(
            x, entries, low, high, token, in_bounds, lse2_R, delta_R, acc, scale_log2, BLOCK_N
        )
    if MODE == SELECTED_ENTRIES:
        one = tl.min(tl.where(in_bounds, token, tokens), 0)
        stop = tl.load(entry_end + one)
        acc = _query_gradient_over_list(
            x,
            entries,
            selected,
            num_selected,
            one,
            stop,
            lse2_R,
            delta_R,
            acc,
            scale_log2,
            BLOCK_N,
            SELECTED_STAGES,
        )
    # Backward of rotation and norm; the normed q is reloaded to save registers.
    acc = acc * softmax_scale
    q = tile(q_and_grad, 2 * row, in_bounds, DIM).to(tl.float32)
    acc -= q * (tl.sum(acc * q, 1) / DIM)[:, None]
    acc = rotate_pairs(acc, cos_sin, token, in_bounds, -1.0, ROWS, DIM, DIM, ROTARY)
    acc *= tl.load(rstd + row, mask=in_bounds, other=0.0)[:, None]
    at = row.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(grad_q + at, acc.to(grad_q.dtype.element_ty), mask=in_bounds[:, None])


def query_gradients(
    call: Call, rows: Rows, q: Tensor, kv: Tensor, entries: Tensor | None, cos_sin: Tensor
) -> Tensor:
    """Returns the gradient of q before its norm and rotation, in its dtype."""
    grad_q = torch.empty_like(q)
    block_t, block_h = call.rows(call.blocks.dq_rows)
    if grad_q.numel():
        _grad_queries[call.grid(block_t, block_h)](
            rows.q_and_grad,
            kv,
            entries,
            call.selected,
            cos_sin,
            *call.visible,
            rows.rstd,
            rows.lse2,
            rows.delta,
            grad_q,
            call.tokens,
            call.heads,
            call.num_selected,
            call.scale_log2,
            call.softmax_scale,
            DIM=call.dim,
            ROTARY=cos_sin.shape[1],
            BLOCK_T=block_t,
            BLOCK_H=block_h,
            BLOCK_N=call.blocks.dq_keys,
            MODE=call.mode,
            SELECTED_STAGES=selected_stages(call.blocks.dq_stages),
            **call.blocks.dq_options,
        )
    return grad_q
