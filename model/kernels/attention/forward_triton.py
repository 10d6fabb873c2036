"""Core attention in Triton for Hopper, forward and backward; compared with ``naive.py``.

One key serves all heads and is its own value, so a program holds ``rows`` pairs (token, head), 64
heads of one token at V4's widths, reads each tile of keys once and uses it for both matmuls. The
softmax is online, in base 2, over a range of window tokens and then a range of entries or a
gathered list; it starts from the sink (logit in, no value). Every mask is a pair of integers per
query. Forward saves only out and lse2. Backward writes the normalised, rotated queries and the
rotated gradient once (a workspace of two tensors of q's size), because every block of keys reads
them.

What one query token costs, n being the keys that it sees (window W and entries), in bf16:

    forward    4·H·K·n operations; reads q, writes out: 4·H·K bytes; keys come from L2
    backward  14·H·K·n operations (4 for s and dp twice, 6 for dq and dk); 20·H·K bytes: reads q,
               out, grad_out and writes the workspace; reads that twice; writes dq

    floor per token at 989 TFLOP/s and 3.35 TB/s, forward / backward, in ns:
                               n     operations      bytes       measured
    Flash, window only        128      17 /   59    39 / 196     not yet timed
    Flash, HCA of 64K rows    384      51 /  178    39 / 196     not yet timed
    Flash, CSA, k = 512       640      85 /  297    39 / 196 *   not yet timed
    Pro, HCA of 64K rows      384     102 /  356    78 / 391     not yet timed
    Pro, CSA, k = 1024       1152     305 / 1069    78 / 391 *   not yet timed

    * and 8·k·K bytes more in a deterministic backward: each (query, entry) pair's share of the
      entries' gradient, written and read back: 626 ns (Flash), 1252 ns (Pro). With atomics those
      are 4·k·K bytes of additions in L2.

At K = 512 the accumulator [64, 512] in fp32 fills half of the registers of a multiprocessor and q
[64, 512] 64 KiB of its shared memory, so one program of 8 warps runs per multiprocessor and the
key tile is what is left to choose; queries and keys get their gradients from separate kernels,
which makes keys' gradients sums in a fixed order. As compiled for Hopper, both halves of a
program's warps compute s, so that forward issues 6·H·K·n operations for the 4·H·K·n it needs.

T queries; H heads; K their width (DIM); R rotated dims (ROTARY); C entries; k selected entries.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.attention.inputs import AttentionInputs
from model.kernels.attention.key_gradient_triton import entry_gradients, range_gradients
from model.kernels.attention.parts_triton import (
    LOG2E,
    Blocks,
    Call,
    blocks_for,
    bounds,
    check,
    range_tile,
    ready_queries,
    rows_of_program,
    selected_tile,
)
from model.kernels.attention.query_gradient_triton import prepared, query_gradients
from model.kernels.attention.ranges import AttentionRanges
from model.kernels.norm.rotation_triton import angles_of, turned


@triton.jit
def _staged_ready(
    q,
    stage,
    rotation,
    row,
    token,
    live,
    eps,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """`ready_queries` in the dtype of ``stage``, by way of it: it is like q and free until the end.

    What a program loads, Triton hands to the tensor cores from shared memory; what it computes,
    from registers, of which the accumulator leaves too few. The detour stays in L2.
    """
    ready, _ = ready_queries(q, rotation, row, token, live, eps, ROWS, DIM, ROTARY)
    at = row.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(stage + at, ready.to(stage.dtype.element_ty), mask=live[:, None])
    tl.debug_barrier()
    return tl.load(stage + at, mask=live[:, None], other=0.0)


@triton.jit
def _softmax_step(q, k, visible, top, total, acc, scale):
    """One online-softmax step over keys k, which are also the values."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    s = tl.where(visible, s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(k.dtype), k, acc * shrink[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit
def _softmax_over_range(
    q,
    keys,
    low_T,
    high_T,
    token,
    live,
    top,
    total,
    acc,
    scale,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The steps over all keys that each row sees, from low_T to high_T."""
    low, high, first, end = bounds(low_T, high_T, token, live)
    for start in tl.range(first, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k, visible = range_tile(keys, n, low, high, end, DIM)
        top, total, acc = _softmax_step(q, k, visible, top, total, acc, scale)
    return top, total, acc


@triton.jit
def _forward(
    q,
    keys,
    entries,
    selected,
    sink,
    rotation,
    key_start,
    key_end,
    entry_start,
    entry_end,
    out,
    lse2,
    tokens,
    heads,
    num_selected,
    eps,
    scale,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MODE: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCK_T * BLOCK_H
    token, head, row, live = rows_of_program(tokens, heads, BLOCK_T, BLOCK_H)
    ready = _staged_ready(q, out, rotation, row, token, live, eps, ROWS, DIM, ROTARY)
    top = tl.load(sink + head, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
    total = tl.full((ROWS,), 1.0, tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    top, total, acc = _softmax_over_range(
        ready, keys, key_start, key_end, token, live, top, total, acc, scale, DIM, BLOCK_N
    )
    if MODE == 1:
        top, total, acc = _softmax_over_range(
            ready,
            entries,
            entry_start,
            entry_end,
            token,
            live,
            top,
            total,
            acc,
            scale,
            DIM,
            BLOCK_N,
        )
    if MODE == 2:
        one = tl.min(tl.where(live, token, tokens), 0)
        for start in tl.range(0, tl.load(entry_end + one), BLOCK_N):
            place = start + tl.arange(0, BLOCK_N)
            entry, k = selected_tile(entries, selected, one, place, num_selected, DIM)
            top, total, acc = _softmax_step(ready, k, (entry >= 0)[None, :], top, total, acc, scale)
    acc = turned(acc / total[:, None], rotation, token, live, -1.0, ROWS, DIM, DIM, ROTARY)
    at = row.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=live[:, None])
    tl.store(lse2 + row, top + tl.log2(total), mask=live)


def attention(
    inputs: AttentionInputs, *, deterministic: bool = True, blocks: Blocks | None = None
) -> tuple[Tensor, Tensor]:
    """Computes ``model.kernels.attention.attention_with_lse2`` in Triton.

    Args:
        deterministic: the gradient of selected entries is summed in a fixed order through a
            workspace instead of by atomics. All other gradients always are.
        blocks: sizes of the launches; those for K by default.

    Returns:
        [T, H, K] in q's dtype, and lse2 fp32 [T, H]: log2 of the softmax's denominator, sink
        included, which has no gradient.

    Raises:
        UnsupportedError: a GPU cannot run this device, dtype or K, or T·H is 2^30 or more.
        ValueError: K has no known sizes and ``blocks`` is not given.
    """
    q_THK, entries_CK, selected_Tk = inputs.q_THK, inputs.entries_CK, inputs.selected_Tk
    check(q_THK)
    blocks = blocks or blocks_for(q_THK.shape[-1])
    if entries_CK is None or entries_CK.shape[0] == 0:
        entries_CK, selected_Tk = None, None
    return _Attention.apply(
        q_THK.contiguous(),
        inputs.kv_TK.contiguous(),
        None if entries_CK is None else entries_CK.contiguous(),
        inputs.sink_H,
        angles_of(inputs.rotation_TR),
        inputs.ranges,
        selected_Tk,
        inputs.norm_eps,
        deterministic,
        blocks,
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        entries: Tensor | None,
        sink: Tensor,
        angles: Tensor,
        ranges: AttentionRanges,
        selected: Tensor | None,
        eps: float,
        deterministic: bool,
        blocks: Blocks,
    ) -> tuple[Tensor, Tensor]:
        call = Call(q, entries, ranges, selected, blocks)
        out = torch.empty_like(q)
        lse2 = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        block_t, block_h = call.rows(blocks.rows)
        if q.numel():
            _forward[call.grid(block_t, block_h)](
                q,
                kv,
                entries,
                call.selected,
                sink.contiguous(),
                angles,
                *call.visible,
                out,
                lse2,
                call.tokens,
                call.heads,
                call.num_selected,
                eps,
                call.scale,
                DIM=call.dim,
                ROTARY=angles.shape[1],
                BLOCK_T=block_t,
                BLOCK_H=block_h,
                BLOCK_N=blocks.keys,
                MODE=call.mode,
                **blocks.options,
            )
        ctx.eps, ctx.ranges, ctx.blocks, ctx.deterministic = eps, ranges, blocks, deterministic
        ctx.save_for_backward(q, kv, entries, sink, angles, selected, out, lse2)
        ctx.mark_non_differentiable(lse2)
        return out, lse2

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, entries, sink, angles, selected, out, lse2 = ctx.saved_tensors
        call = Call(q, entries, ctx.ranges, selected, ctx.blocks)
        rows = prepared(q, out, grad_out.contiguous(), angles, lse2, ctx.eps, call.blocks)
        grad_q = query_gradients(call, rows, q, kv, entries, angles)
        grad_kv = range_gradients(call, rows, kv, call.key_start, call.key_end).to(kv.dtype)
        grad_entries = entry_gradients(call, rows, entries, ctx.deterministic)
        share_TH = torch.exp2(sink.float() * LOG2E - lse2)
        grad_sink = -(share_TH * rows.delta).sum(0).to(sink.dtype)
        return grad_q, grad_kv, grad_entries, grad_sink, *[None] * 6
