"""Core attention in Triton for Hopper, forward and backward; compared with ``naive.py``.

All heads share one key-value head whose keys are the values. A program therefore handles ``rows``
(token, head) pairs (64 heads of one token at V4's widths), loads each key tile once and uses it for
both matmuls. The softmax is online, in base 2, over a range of window tokens and then over a range
of entries or the selected entries; it starts from the sink's logit, which has no value. Every mask
is a pair of integers per query. Forward saves only out and lse2. Backward writes the normed,
rotated queries and the rotated gradient once (a workspace of two tensors of q's size), because
every block of keys reads them.

Cost of one query token in bf16, n being the number of keys that it sees (window W and entries):

    forward    4·H·K·n FLOPs; reads q, writes out: 4·H·K bytes; keys come from L2
    backward  14·H·K·n FLOPs (4 for s and dp twice, 6 for dq and dk); 20·H·K bytes: reads q,
               out, grad_out and writes the workspace; reads that twice; writes dq

    roofline bound per token on an H100 SXM (989 dense bf16 TFLOP/s, 3.35 TB/s), forward / backward,
    in ns:
                               n       FLOPs         bytes       measured
    Flash, window only        128      17 /   59    39 / 196     not yet timed
    Flash, HCA of 64K rows    384      51 /  178    39 / 196     not yet timed
    Flash, CSA, k = 512       640      85 /  297    39 / 196 *   not yet timed
    Pro, HCA of 64K rows      384     102 /  356    78 / 391     not yet timed
    Pro, CSA, k = 1024       1152     305 / 1069    78 / 391 *   not yet timed

    * and 4·k·K bytes more if the selected entries' gradient is summed in a fixed order: each
      (query, entry) pair's term in bf16, written and read back: 313 ns (Flash), 626 ns (Pro), less
      where queries see at most k entries. With atomics as many bytes are added in L2.

At K = 512 the fp32 accumulator [64, 512] fills half of an SM's registers, and q [64, 512] takes
64 KiB of its shared memory, so one program of 8 warps runs per SM. Nothing else hides a copy there,
so keys are copied several steps ahead: steps are short (32 keys), because four of 64 do not fit.
Queries and keys get their gradients from separate kernels, so that the keys' gradients are sums in
a fixed order. docs/performance.md counts the clocks of each loop.

T queries; H heads; K their width (DIM); R rotary dims (ROTARY); C entries; k selected entries of a
query.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.attention.inputs import AttentionInputs
from model.kernels.attention.key_gradient_triton import entry_gradients, range_gradients
from model.kernels.attention.parts_triton import (
    ENTRY_RANGE,
    SELECTED_ENTRIES,
    Blocks,
    Call,
    blocks_for,
    bounds,
    check,
    load_queries,
    range_tile,
    rows_of_program,
    selected_stages,
    selected_tile,
    transposed_dot,
)
from model.kernels.attention.query_gradient_triton import prepare_rows, query_gradients
from model.kernels.attention.ranges import AttentionRanges
from model.kernels.norm.rotation_triton import cos_sin_of, rotate_pairs


@triton.jit
def _staged_queries(
    q,
    stage,
    cos_sin,
    row,
    token,
    in_bounds,
    eps,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Stores `load_queries` in ``stage`` and loads it back in its dtype.

    ``stage`` is a buffer shaped like q, here the output, which is not written before the end.
    Triton feeds loaded operands to the tensor cores from shared memory but computed ones from
    registers, of which the accumulator leaves too few. The detour stays in L2.
    """
    normed_q, _ = load_queries(q, cos_sin, row, token, in_bounds, eps, ROWS, DIM, ROTARY)
    at = row.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(stage + at, normed_q.to(stage.dtype.element_ty), mask=in_bounds[:, None])
    tl.debug_barrier()
    return tl.load(stage + at, mask=in_bounds[:, None], other=0.0)


@triton.jit
def _softmax_step(q, k, visible, any_key, top, total, acc, scale_log2):
    """Computes one online-softmax step over keys k, which are also the values."""
    s = transposed_dot(q, k, any_key) * scale_log2
    s = tl.where(visible, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - new_top[:, None])
    rescale = tl.exp2(top - new_top)
    total = total * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(k.dtype), k, acc * rescale[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def _softmax_over_range(
    q, keys, low_T, high_T, token, in_bounds, top, total, acc, scale_log2, BLOCK_N: tl.constexpr
):
    """Runs `_softmax_step` over all keys in each row's range [low_T, high_T)."""
    low, high, first, end = bounds(low_T, high_T, token, in_bounds)
    for start in tl.range(first, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k, visible = range_tile(keys, n, low, high, end, q.shape[1])
        top, total, acc = _softmax_step(q, k, visible, start < end, top, total, acc, scale_log2)
    return top, total, acc


@triton.jit
def _softmax_over_list(
    q,
    entries,
    selected,
    num_selected,
    token,
    stop,
    top,
    total,
    acc,
    scale_log2,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Runs `_softmax_step` over the first ``stop`` selected entries of one token."""
    for start in tl.range(0, stop, BLOCK_N, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_N)
        _, k = selected_tile(entries, selected, token, column, stop, num_selected, q.shape[1])
        visible = (column < stop)[None, :]
        top, total, acc = _softmax_step(q, k, visible, start < stop, top, total, acc, scale_log2)
    return top, total, acc


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    q,
    keys,
    entries,
    selected,
    sink,
    cos_sin,
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
    scale_log2,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MODE: tl.constexpr,
    SELECTED_STAGES: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCK_T * BLOCK_H
    token, head, row, in_bounds = rows_of_program(tokens, heads, BLOCK_T, BLOCK_H)
    x = _staged_queries(q, out, cos_sin, row, token, in_bounds, eps, ROWS, DIM, ROTARY)
    top = tl.load(sink + head, mask=in_bounds, other=0.0).to(tl.float32) * 1.4426950408889634
    total = tl.full((ROWS,), 1.0, tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    top, total, acc = _softmax_over_range(
        x, keys, key_start, key_end, token, in_bounds, top, total, acc, scale_log2, BLOCK_N
    )
    if MODE == ENTRY_RANGE:
        low, high = entry_start, entry_end
        top, total, acc = _softmax_over_range(
            x, entries, low, high, token, in_bounds, top, total, acc, scale_log2, BLOCK_N
        )
    if MODE == SELECTED_ENTRIES:
        one = tl.min(tl.where(in_bounds, token, tokens), 0)
        stop = tl.load(entry_end + one)
        top, total, acc = _softmax_over_list(
            x,
            entries,
            selected,
            num_selected,
            one,
            stop,
            top,
            total,
            acc,
            scale_log2,
            BLOCK_N,
            SELECTED_STAGES,
        )
    acc = rotate_pairs(
        acc / total[:, None], cos_sin, token, in_bounds, -1.0, ROWS, DIM, DIM, ROTARY
    )
    at = row.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=in_bounds[:, None])
    tl.store(lse2 + row, top + tl.log2(total), mask=in_bounds)


def launch(
    call: Call,
    q: Tensor,
    kv: Tensor,
    entries: Tensor | None,
    sink: Tensor,
    cos_sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Returns out and lse2 as `attention` does; q, kv and entries are contiguous."""
    out = torch.empty_like(q)
    lse2 = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    blocks = call.blocks
    block_t, block_h = call.rows(blocks.rows)
    if q.numel():
        _forward[call.grid(block_t, block_h)](
            q,
            kv,
            entries,
            call.selected,
            sink.contiguous(),
            cos_sin,
            *call.visible,
            out,
            lse2,
            call.tokens,
            call.heads,
            call.num_selected,
            eps,
            call.scale_log2,
            DIM=call.dim,
            ROTARY=cos_sin.shape[1],
            BLOCK_T=block_t,
            BLOCK_H=block_h,
            BLOCK_N=blocks.keys,
            MODE=call.mode,
            SELECTED_STAGES=selected_stages(blocks.stages),
            **blocks.options,
        )
    return out, lse2


def attention(
    inputs: AttentionInputs,
    *,
    deterministic: bool = True,
    blocks: Blocks | None = None,
    forward: Callable[..., tuple[Tensor, Tensor]] = launch,
) -> tuple[Tensor, Tensor]:
    """Computes ``model.kernels.attention.attention_with_lse2`` in Triton.

    Args:
        deterministic: the gradient of selected entries is summed in a fixed order through a
            workspace instead of by atomics. All other gradients are deterministic anyway.
        blocks: block sizes of the launches; by default those for K.
        forward: a function with the arguments and results of `launch`.

    Returns:
        [T, H, K] in q's dtype, and lse2 fp32 [T, H]: log2 of the softmax's denominator, sink
        included, which has no gradient.

    Raises:
        UnsupportedError: a GPU cannot run this device, dtype or K, or T·H is 2^30 or more.
        ValueError: no block sizes are known for K and ``blocks`` is not given.
    """
    q_THK, entries_CK, selected_Tk = inputs.q_THK, inputs.entries_CK, inputs.selected_Tk
    check(q_THK)
    blocks = blocks or blocks_for(q_THK.shape[-1])
    if entries_CK is None or entries_CK.shape[0] == 0:
        entries_CK, selected_Tk = None, None
    return _Attention.apply(
        q_THK.contiguous(),
        inputs.kv_LK.contiguous(),
        None if entries_CK is None else entries_CK.contiguous(),
        inputs.sink_H,
        cos_sin_of(inputs.rotation_Tr),
        inputs.ranges,
        selected_Tk,
        inputs.norm_eps,
        deterministic,
        blocks,
        forward,
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        entries: Tensor | None,
        sink: Tensor,
        cos_sin: Tensor,
        ranges: AttentionRanges,
        selected: Tensor | None,
        eps: float,
        deterministic: bool,
        blocks: Blocks,
        compute: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        call = Call(q, entries, ranges, selected, blocks)
        out, lse2 = compute(call, q, kv, entries, sink, cos_sin, eps)
        ctx.eps, ctx.ranges, ctx.blocks, ctx.deterministic = eps, ranges, blocks, deterministic
        ctx.entry_end = call.entry_end
        ctx.save_for_backward(q, kv, entries, sink, cos_sin, selected, out, lse2)
        ctx.mark_non_differentiable(lse2)
        return out, lse2

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, entries, sink, cos_sin, selected, out, lse2 = ctx.saved_tensors
        call = Call(q, entries, ctx.ranges, selected, ctx.blocks, ctx.entry_end)
        grad_out = grad_out.contiguous()
        rows = prepare_rows(q, out, grad_out, sink, cos_sin, lse2, ctx.eps, call.blocks)
        grad_q = query_gradients(call, rows, q, kv, entries, cos_sin)
        grad_kv = range_gradients(call, rows, kv, call.key_start, call.key_end, "keys").to(kv.dtype)
        ordered = ctx.deterministic or call.blocks.ordered == 1
        grad_entries = entry_gradients(call, rows, entries, ordered)
        grad_sink = rows.grad_sink.sum(0).to(sink.dtype)
        return grad_q, grad_kv, grad_entries, grad_sink, *[None] * 7
