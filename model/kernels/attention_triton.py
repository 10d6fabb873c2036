"""Core attention in Triton for Hopper, forward and backward; the reference is ``attention.py``.

One key serves all heads and is its own value, so a program holds ``rows`` pairs (token, head), 64
heads of one token at V4's widths, reads each tile of keys once and uses it for both products. The
softmax is online, in base 2, over a range of window tokens and then a range of entries or a
gathered list; it starts from the sink (logit in, no value). Every mask is a pair of integers per
query. Forward keeps only out and lse. Backward writes the normed, rotated queries and the rotated
gradient once (a workspace of two tensors of q's size), because every block of keys reads them.

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
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels import backend
from model.kernels.attention import AttentionRanges

_LOG2E = math.log2(math.e)
_NO_ENTRIES, _ENTRY_RANGE, _PICKED_ENTRIES = range(3)
_FEWEST_ROWS = 16
"""The tensor cores take no fewer."""
_FAR = tl.constexpr(2**31 - 1)


@dataclass(frozen=True)
class Blocks:
    """Sizes of the launches, all powers of two.

    Attributes:
        rows, keys: pairs (token, head) of a program and keys of a step, where rows stay.
        grad_rows, grad_keys: the same in the kernel of the queries' gradient.
        key_rows, key_keys: in the kernels of the keys' gradient, where keys stay.
        programs: with fewer blocks of keys than this, their queries are divided over several
            programs whose sums are added afterwards.
        pair_bytes: workspace of a deterministic gradient of picked entries.
    """

    rows: int
    keys: int
    grad_rows: int
    grad_keys: int
    key_rows: int
    key_keys: int
    warps: int = 8
    stages: int = 2
    programs: int = 528
    pair_bytes: int = 1 << 30


_BLOCKS = {
    64: Blocks(128, 64, 128, 64, 64, 64, warps=8, stages=3),
    128: Blocks(128, 64, 64, 64, 64, 64, warps=8, stages=2),
    256: Blocks(64, 64, 64, 32, 32, 64, warps=8, stages=2),
    512: Blocks(64, 64, 64, 32, 32, 64, warps=8, stages=2),
}


def blocks_for(head_dim: int) -> Blocks:
    """The sizes for a head width.

    Raises:
        ValueError: no sizes are known for this width.
    """
    if head_dim not in _BLOCKS:
        raise ValueError(f"head_dim is {head_dim}; Triton attention knows {sorted(_BLOCKS)}")
    return _BLOCKS[head_dim]


# Parts of kernels. ``token`` and ``row`` index [T] and [T, H]; ``live`` masks what is outside.


@triton.jit
def _rotated(
    x, rotation, token, live, sign, ROWS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr
):
    """fp32 x [ROWS, DIM] with its last ROTARY dims turned as adjacent pairs by sign · angle."""
    even, odd = tl.split(tl.reshape(x, (ROWS, DIM // 2, 2)))
    pair = tl.arange(0, DIM // 2) - (DIM - ROTARY) // 2
    turns = live[:, None] & (pair >= 0)[None, :]
    at = rotation + token[:, None] * ROTARY + 2 * pair[None, :]
    cos = tl.load(at, mask=turns, other=1.0)
    sin = tl.load(at + 1, mask=turns, other=0.0) * sign
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, DIM))


@triton.jit
def _ready(
    q,
    rotation,
    row,
    token,
    live,
    eps,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Queries [ROWS, DIM] in fp32 after their norm and rotation, and 1 / rms [ROWS]."""
    dim = tl.arange(0, DIM)
    at = row.to(tl.int64)[:, None] * DIM + dim[None, :]
    x = tl.load(q + at, mask=live[:, None], other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)
    return _rotated(x * rstd[:, None], rotation, token, live, 1.0, ROWS, DIM, ROTARY), rstd


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
    """``_ready`` in stage's dtype, by way of ``stage``, which is like q and free until the end.

    What a program loads, Triton hands to the tensor cores from shared memory; what it computes,
    from registers, of which the accumulator leaves too few. The detour stays in L2.
    """
    ready, _ = _ready(q, rotation, row, token, live, eps, ROWS, DIM, ROTARY)
    at = row.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(stage + at, ready.to(stage.dtype.element_ty), mask=live[:, None])
    tl.debug_barrier()
    return tl.load(stage + at, mask=live[:, None], other=0.0)


@triton.jit
def _tile(keys, index, valid, DIM: tl.constexpr):
    """Keys [n, DIM] by index [n]; zeros where not valid."""
    at = index.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    return tl.load(keys + at, mask=valid[:, None], other=0.0)


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
def _query_gradient_step(
    both, k, visible, lse, along, acc, scale, ROWS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Adds this tile's ds · k to the gradient of the ready queries.

    ``both`` [2·ROWS, DIM] alternates queries and their gradients: one product gives s and dp.
    """
    x = tl.dot(both, tl.trans(k), input_precision="ieee")
    s, dp = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, BLOCK_N)), (0, 2, 1)))
    p = tl.exp2(tl.where(visible, s * scale - lse[:, None], float("-inf")))
    ds = p * (dp - along[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")


@triton.jit
def _key_gradient_step(
    both, k, visible, lse, along, acc, scale, root, ROWS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Adds dsᵀ · q + pᵀ · grad, this tile of queries' share, to the gradient of keys k.

    ``both`` [2·ROWS, DIM] alternates queries and their gradients, so that each is one product.
    """
    x = tl.dot(k, tl.trans(both), input_precision="ieee")
    s, dp = tl.split(tl.reshape(x, (BLOCK_N, ROWS, 2)))
    p = tl.exp2(tl.where(visible, s * scale - lse[None, :], float("-inf")))
    ds = p * (dp - along[None, :]) * root
    weight = tl.reshape(tl.join(ds, p), (BLOCK_N, 2 * ROWS))
    return tl.dot(weight.to(both.dtype), both, acc, input_precision="ieee")


@triton.jit
def _rows_of_program(tokens, heads, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """token, head, row, live of BLOCK_T tokens by BLOCK_H heads; the last tokens come first."""
    head_blocks = tl.cdiv(heads, BLOCK_H)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    place = tl.arange(0, BLOCK_T * BLOCK_H)
    token = program // head_blocks * BLOCK_T + place // BLOCK_H
    head = program % head_blocks * BLOCK_H + place % BLOCK_H
    live = (token < tokens) & (head < heads)
    return token, head, token * heads + head, live


@triton.jit
def _pairs_of_program(tokens, heads, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """The same rows in an array of two for each: [2 · BLOCK_T · BLOCK_H] and live."""
    head_blocks = tl.cdiv(heads, BLOCK_H)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    place = tl.arange(0, 2 * BLOCK_T * BLOCK_H)
    token = program // head_blocks * BLOCK_T + place // (2 * BLOCK_H)
    head = program % head_blocks * BLOCK_H + place // 2 % BLOCK_H
    return 2 * (token * heads + head) + place % 2, (token < tokens) & (head < heads)


@triton.jit
def _bounds(low, high, token, live):
    """Each row's range of keys, and the range of all rows together."""
    first = tl.load(low + token, mask=live, other=_FAR)
    end = tl.load(high + token, mask=live, other=0)
    return first, end, tl.min(first, 0), tl.max(end, 0)


@triton.jit
def _forward(
    q,
    keys,
    entries,
    picked,
    sink,
    rotation,
    key_start,
    key_end,
    entry_start,
    entry_end,
    out,
    lse,
    tokens,
    heads,
    picks,
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
    token, head, row, live = _rows_of_program(tokens, heads, BLOCK_T, BLOCK_H)
    ready = _staged_ready(q, out, rotation, row, token, live, eps, ROWS, DIM, ROTARY)
    top = tl.load(sink + head, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
    total = tl.full((ROWS,), 1.0, tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    place = tl.arange(0, BLOCK_N)
    low, high, first, end = _bounds(key_start, key_end, token, live)
    for start in tl.range(first, end, BLOCK_N):
        n = start + place
        k = _tile(keys, n, n < end, DIM)
        visible = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
        top, total, acc = _softmax_step(ready, k, visible, top, total, acc, scale)
    if MODE == 1:
        low, high, first, end = _bounds(entry_start, entry_end, token, live)
        for start in tl.range(first, end, BLOCK_N):
            n = start + place
            k = _tile(entries, n, n < end, DIM)
            visible = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
            top, total, acc = _softmax_step(ready, k, visible, top, total, acc, scale)
    if MODE == 2:
        one = tl.min(tl.where(live, token, tokens), 0)
        for start in tl.range(0, tl.load(entry_end + one), BLOCK_N):
            n = start + place
            entry = tl.load(picked + one.to(tl.int64) * picks + n, mask=n < picks, other=-1)
            k = _tile(entries, entry, entry >= 0, DIM)
            top, total, acc = _softmax_step(ready, k, (entry >= 0)[None, :], top, total, acc, scale)
    acc = _rotated(acc / total[:, None], rotation, token, live, -1.0, ROWS, DIM, ROTARY)
    at = row.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=live[:, None])
    tl.store(lse + row, top + tl.log2(total), mask=live)


@triton.jit
def _prepare(
    q,
    out,
    grad_out,
    rotation,
    both,
    rstd,
    along,
    rows,
    heads,
    eps,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of every row: the ready query and its output's gradient rotated alike; 1 / rms; Σ g · o."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    token = row // heads
    at = row.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    x, r = _ready(q, rotation, row, token, live, eps, ROWS, DIM, ROTARY)
    pair = 2 * row.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(both + pair, x.to(both.dtype.element_ty), mask=live[:, None])
    tl.store(rstd + row, r, mask=live)
    grad = tl.load(grad_out + at, mask=live[:, None], other=0.0).to(tl.float32)
    o = tl.load(out + at, mask=live[:, None], other=0.0).to(tl.float32)
    tl.store(along + row, tl.sum(grad * o, 1), mask=live)
    grad = _rotated(grad, rotation, token, live, 1.0, ROWS, DIM, ROTARY)
    tl.store(both + pair + DIM, grad.to(both.dtype.element_ty), mask=live[:, None])


@triton.jit
def _grad_queries(
    both,
    keys,
    entries,
    picked,
    rotation,
    key_start,
    key_end,
    entry_start,
    entry_end,
    rstd,
    lse,
    along,
    grad_q,
    tokens,
    heads,
    picks,
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
    token, _, row, live = _rows_of_program(tokens, heads, BLOCK_T, BLOCK_H)
    pair, pair_live = _pairs_of_program(tokens, heads, BLOCK_T, BLOCK_H)
    q_and_grad = _tile(both, pair, pair_live, DIM)
    row_lse = tl.load(lse + row, mask=live, other=0.0)
    row_along = tl.load(along + row, mask=live, other=0.0)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    place = tl.arange(0, BLOCK_N)
    low, high, first, end = _bounds(key_start, key_end, token, live)
    for start in tl.range(first, end, BLOCK_N):
        n = start + place
        k = _tile(keys, n, n < end, DIM)
        visible = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
        acc = _query_gradient_step(
            q_and_grad, k, visible, row_lse, row_along, acc, scale, ROWS, BLOCK_N
        )
    if MODE == 1:
        low, high, first, end = _bounds(entry_start, entry_end, token, live)
        for start in tl.range(first, end, BLOCK_N):
            n = start + place
            k = _tile(entries, n, n < end, DIM)
            visible = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
            acc = _query_gradient_step(
                q_and_grad, k, visible, row_lse, row_along, acc, scale, ROWS, BLOCK_N
            )
    if MODE == 2:
        one = tl.min(tl.where(live, token, tokens), 0)
        for start in tl.range(0, tl.load(entry_end + one), BLOCK_N):
            n = start + place
            entry = tl.load(picked + one.to(tl.int64) * picks + n, mask=n < picks, other=-1)
            k = _tile(entries, entry, entry >= 0, DIM)
            visible = (entry >= 0)[None, :]
            acc = _query_gradient_step(
                q_and_grad, k, visible, row_lse, row_along, acc, scale, ROWS, BLOCK_N
            )
    # Back through the rotation and the norm, whose output is q, read again to spare registers.
    acc = acc * root
    q = _tile(both, 2 * row, live, DIM).to(tl.float32)
    acc -= q * (tl.sum(acc * q, 1) / DIM)[:, None]
    acc = _rotated(acc, rotation, token, live, -1.0, ROWS, DIM, ROTARY)
    acc *= tl.load(rstd + row, mask=live, other=0.0)[:, None]
    at = row.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(grad_q + at, acc.to(grad_q.dtype.element_ty), mask=live[:, None])


@triton.jit
def _grad_keys(
    both,
    keys,
    start_T,
    end_T,
    query_start,
    query_end,
    lse,
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
    k = _tile(keys, n, n < count, DIM)
    acc = tl.zeros((BLOCK_N, DIM), tl.float32)
    first = tl.load(query_start + block) * heads
    last = tl.load(query_end + block) * heads
    share = tl.cdiv(tl.cdiv(last - first, parts), ROWS) * ROWS
    end = tl.minimum(first + (part + 1) * share, last)
    for start in tl.range(first + part * share, end, ROWS):
        row = start + tl.arange(0, ROWS)
        live = row < end
        token = row // heads
        low = tl.load(start_T + token, mask=live, other=_FAR)
        high = tl.load(end_T + token, mask=live, other=0)
        pair = 2 * start + tl.arange(0, 2 * ROWS)
        q_and_grad = _tile(both, pair, pair < 2 * end, DIM)
        row_lse = tl.load(lse + row, mask=live, other=0.0)
        row_along = tl.load(along + row, mask=live, other=0.0)
        visible = (n[:, None] >= low[None, :]) & (n[:, None] < high[None, :])
        acc = _key_gradient_step(
            q_and_grad, k, visible, row_lse, row_along, acc, scale, root, ROWS, BLOCK_N
        )
    at = (part.to(tl.int64) * count + n)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(grad + at, acc, mask=(n < count)[:, None])


@triton.jit
def _grad_picks(
    both,
    entries,
    picked,
    lse,
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
    for each pair (token, pick), [tokens · picks, DIM], which ``_sum_picks`` adds up in order.
    """
    token = first_token + tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    entry = tl.load(picked + token.to(tl.int64) * picks + n, mask=n < picks, other=-1)
    if tl.max(entry, 0) >= 0:
        k = _tile(entries, entry, entry >= 0, DIM)
        acc = tl.zeros((BLOCK_N, DIM), tl.float32)
        for start in tl.range(0, heads, ROWS):
            head = start + tl.arange(0, ROWS)
            live = head < heads
            row = token * heads + head
            pair = 2 * start + tl.arange(0, 2 * ROWS)
            q_and_grad = _tile(both, 2 * token * heads + pair, pair < 2 * heads, DIM)
            row_lse = tl.load(lse + row, mask=live, other=0.0)
            row_along = tl.load(along + row, mask=live, other=0.0)
            visible = (entry >= 0)[:, None] & live[None, :]
            acc = _key_gradient_step(
                q_and_grad, k, visible, row_lse, row_along, acc, scale, root, ROWS, BLOCK_N
            )
        dim = tl.arange(0, DIM)[None, :]
        if ATOMIC:
            at = entry.to(tl.int64)[:, None] * DIM + dim
            tl.atomic_add(grad + at, acc, mask=(entry >= 0)[:, None], sem="relaxed")
        else:
            pair = tl.program_id(0).to(tl.int64) * picks + n
            tl.store(grad + pair[:, None] * DIM + dim, acc, mask=(entry >= 0)[:, None])


@triton.jit
def _sum_picks(pairs, order, bounds, grad, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Adds to one entry's gradient the rows of its pairs, in the order of the queries."""
    entry = tl.program_id(0)
    first, last = tl.load(bounds + entry), tl.load(bounds + entry + 1)
    if last > first:
        acc = tl.zeros((DIM,), tl.float32)
        for start in tl.range(first, last, BLOCK):
            i = start + tl.arange(0, BLOCK)
            pair = tl.load(order + i, mask=i < last, other=0)
            acc += tl.sum(_tile(pairs, pair, i < last, DIM), 0)
        at = grad + entry.to(tl.int64) * DIM + tl.arange(0, DIM)
        tl.store(at, tl.load(at) + acc)


@triton.jit
def _mass(
    q,
    entries,
    picked,
    rotation,
    entry_start,
    entry_end,
    lse,
    mass,
    tokens,
    heads,
    begin,
    width,
    eps,
    scale,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MODE: tl.constexpr,
):
    """Probabilities summed over heads, [BLOCK_T, width], one block of heads after the other."""
    ROWS: tl.constexpr = BLOCK_T * BLOCK_H
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    place = tl.arange(0, ROWS)
    own = program * BLOCK_T + tl.arange(0, BLOCK_T)
    token = program * BLOCK_T + place // BLOCK_H
    low = tl.load(entry_start + token, mask=token < tokens, other=_FAR)
    high = tl.load(entry_end + token, mask=token < tokens, other=0)
    first, end = tl.min(low, 0), tl.max(high, 0)
    for head_start in tl.range(0, heads, BLOCK_H):
        head = head_start + place % BLOCK_H
        live = (token < tokens) & (head < heads)
        row = token * heads + head
        ready, _ = _ready(q, rotation, row, token, live, eps, ROWS, DIM, ROTARY)
        ready = ready.to(q.dtype.element_ty)
        row_lse = tl.load(lse + row, mask=live, other=0.0)
        for start in tl.range(0, width, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            if MODE == 1:
                n = begin + column
                some = (begin + start < end) & (begin + start + BLOCK_N > first)
                seen = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None]) & live[:, None]
            else:
                at = (program * BLOCK_T).to(tl.int64) * width
                n = tl.load(picked + at + column, mask=column < width, other=-1)
                some = tl.max(n, 0) >= 0
                seen = (n >= 0)[None, :] & live[:, None]
            share = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            if some:
                k = _tile(entries, n, (n >= 0) & (column < width) & (n < end), DIM)
                s = tl.dot(ready, tl.trans(k), input_precision="ieee") * scale
                p = tl.exp2(tl.where(seen, s - row_lse[:, None], float("-inf")))
                share = tl.sum(tl.reshape(p, (BLOCK_T, BLOCK_H, BLOCK_N)), 1)
            at = mass + own.to(tl.int64)[:, None] * width + column[None, :]
            kept = (own < tokens)[:, None] & (column < width)[None, :]
            if head_start > 0:
                share += tl.load(at, mask=kept, other=0.0)
            tl.store(at, share, mask=kept)
        tl.debug_barrier()


class _Call:
    """What every kernel of one call needs: ranges as int32, sizes, and how entries are read."""

    def __init__(
        self,
        q_THK: Tensor,
        entries_CK: Tensor | None,
        ranges: AttentionRanges,
        selected_Tk: Tensor | None,
        blocks: Blocks,
    ) -> None:
        self.tokens, self.heads, self.dim = q_THK.shape
        self.blocks, self.ranges = blocks, ranges
        self.root = self.dim**-0.5
        self.scale = self.root * _LOG2E
        self.key_start = ranges.window_start_T.int()
        self.key_end = _own_key(ranges.segments, self.tokens, q_THK.device) + 1
        self.picked, self.picks, self.mode = None, 0, _NO_ENTRIES
        self.entry_start = self.entry_end = self.key_start
        if entries_CK is None:
            return
        assert ranges.entry_start_T is not None and ranges.entry_end_T is not None
        self.entry_start, self.entry_end = ranges.entry_start_T.int(), ranges.entry_end_T.int()
        self.mode = _ENTRY_RANGE
        if selected_Tk is not None:
            self.mode, self.picks = _PICKED_ENTRIES, selected_Tk.shape[1]
            self.picked = selected_Tk.int().contiguous()
            # A list is read up to its last pick.
            place = torch.arange(1, self.picks + 1, device=q_THK.device, dtype=torch.int32)
            self.entry_end = (place * (self.picked >= 0)).amax(1)

    def rows(self, most: int) -> tuple[int, int]:
        """Tokens and heads of a program of at most ``most`` rows; lists allow a single token."""
        heads = min(triton.next_power_of_2(self.heads), most)
        if self.mode == _PICKED_ENTRIES:
            return 1, min(max(heads, _FEWEST_ROWS), most)
        return most // heads, heads

    def grid(self, block_t: int, block_h: int) -> tuple[int]:
        return (triton.cdiv(self.tokens, block_t) * triton.cdiv(self.heads, block_h),)


def _own_key(
    segments: tuple[tuple[int, int, int], ...], tokens: int, device: torch.device
) -> Tensor:
    """Number of each query's own key, int32 [T]."""
    key_T = torch.arange(tokens, dtype=torch.int32, device=device)
    for start, stop, shift in segments:
        key_T[start:stop] += shift
    return key_T


def _angles(rotation_TR: Tensor) -> Tensor:
    """Cosine and sine of every pair, fp32 [T, R]."""
    return torch.view_as_real(rotation_TR).flatten(1).contiguous()


def attention(
    q_THK: Tensor,
    kv_TK: Tensor,
    entries_CK: Tensor | None,
    sink_H: Tensor,
    rotation_TR: Tensor,
    ranges: AttentionRanges,
    selected_Tk: Tensor | None = None,
    *,
    norm_eps: float,
    deterministic: bool = True,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """``model.kernels.attention.attention_with_lse`` in Triton; the arguments are the same.

    Args:
        deterministic: the gradient of selected entries is summed in a fixed order through a
            workspace instead of by atomics. All other gradients always are.
        blocks: sizes of the launches; those for K by default.

    Returns:
        [T, H, K] in q's dtype, and lse fp32 [T, H]: log2 of the softmax's denominator, sink
        included, which has no gradient.

    Raises:
        UnsupportedError: a GPU cannot run this device, dtype or K, or T·H is 2^30 or more.
        ValueError: K has no known sizes and ``blocks`` is not given.
    """
    backend.attention(q_THK.device, q_THK.dtype, q_THK.shape[-1], asked=True)
    _check_count(q_THK)
    blocks = blocks or blocks_for(q_THK.shape[-1])
    if entries_CK is None or entries_CK.shape[0] == 0:
        entries_CK, selected_Tk = None, None
    return _Attention.apply(
        q_THK.contiguous(),
        kv_TK.contiguous(),
        None if entries_CK is None else entries_CK.contiguous(),
        sink_H,
        _angles(rotation_TR),
        ranges,
        selected_Tk,
        norm_eps,
        deterministic,
        blocks,
    )


def _check_count(q_THK: Tensor) -> None:
    """Rows (token, head), two for each in backward, are numbered in 32 bits; all offsets in 64."""
    tokens, heads, _ = q_THK.shape
    if tokens * heads >= 1 << 30:
        raise backend.UnsupportedError(
            f"attention: {tokens} tokens of {heads} heads in one call; Triton numbers up to 2^30"
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
        call = _Call(q, entries, ranges, selected, blocks)
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        block_t, block_h = call.rows(blocks.rows)
        if q.numel():
            _forward[call.grid(block_t, block_h)](
                q,
                kv,
                entries,
                call.picked,
                sink.contiguous(),
                angles,
                call.key_start,
                call.key_end,
                call.entry_start,
                call.entry_end,
                out,
                lse,
                call.tokens,
                call.heads,
                call.picks,
                eps,
                call.scale,
                DIM=call.dim,
                ROTARY=angles.shape[1],
                BLOCK_T=block_t,
                BLOCK_H=block_h,
                BLOCK_N=blocks.keys,
                MODE=call.mode,
                num_warps=blocks.warps,
                num_stages=blocks.stages,
            )
        ctx.eps, ctx.ranges, ctx.blocks, ctx.deterministic = eps, ranges, blocks, deterministic
        ctx.save_for_backward(q, kv, entries, sink, angles, selected, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, entries, sink, angles, selected, out, lse = ctx.saved_tensors
        call = _Call(q, entries, ctx.ranges, selected, ctx.blocks)
        rows = _prepared(q, out, grad_out.contiguous(), angles, lse, ctx.eps, call.blocks)
        grad_q = _query_gradients(call, rows, q, kv, entries, angles)
        grad_kv = _range_gradients(call, rows, kv, call.key_start, call.key_end).to(kv.dtype)
        grad_entries = None
        if call.mode == _ENTRY_RANGE:
            grad_entries = _range_gradients(
                call, rows, entries, call.entry_start, call.entry_end
            ).to(entries.dtype)
        elif call.mode == _PICKED_ENTRIES:
            sums = _pick_gradients(call, rows, entries, ctx.deterministic)
            grad_entries = sums.to(entries.dtype)
        share_TH = torch.exp2(sink.float() * _LOG2E - lse)
        grad_sink = -(share_TH * rows.along).sum(0).to(sink.dtype)
        return grad_q, grad_kv, grad_entries, grad_sink, *[None] * 6


@dataclass(frozen=True)
class _Rows:
    """Backward's view of the queries.

    Attributes:
        both: [T, H, 2, K], each ready query and the gradient of its output, rotated alike.
        rstd, lse, along: [T, H]; along is Σ grad · out.
    """

    both: Tensor
    rstd: Tensor
    lse: Tensor
    along: Tensor


def _prepared(
    q: Tensor, out: Tensor, grad: Tensor, angles: Tensor, lse: Tensor, eps: float, blocks: Blocks
) -> _Rows:
    rows = _Rows(
        q.new_empty(*q.shape[:2], 2, q.shape[2]),
        torch.empty_like(lse),
        lse,
        torch.empty_like(lse),
    )
    count, block = lse.numel(), min(16, blocks.rows)
    if count:
        _prepare[(triton.cdiv(count, block),)](
            q,
            out,
            grad,
            angles,
            rows.both,
            rows.rstd,
            rows.along,
            count,
            q.shape[1],
            eps,
            DIM=q.shape[2],
            ROTARY=angles.shape[1],
            ROWS=block,
            num_warps=blocks.warps // 2,
        )
    return rows


def _query_gradients(
    call: _Call, rows: _Rows, q: Tensor, kv: Tensor, entries: Tensor | None, angles: Tensor
) -> Tensor:
    grad_q = torch.empty_like(q)
    block_t, block_h = call.rows(call.blocks.grad_rows)
    if grad_q.numel():
        _grad_queries[call.grid(block_t, block_h)](
            rows.both,
            kv,
            entries,
            call.picked,
            angles,
            call.key_start,
            call.key_end,
            call.entry_start,
            call.entry_end,
            rows.rstd,
            rows.lse,
            rows.along,
            grad_q,
            call.tokens,
            call.heads,
            call.picks,
            call.scale,
            call.root,
            DIM=call.dim,
            ROTARY=angles.shape[1],
            BLOCK_T=block_t,
            BLOCK_H=block_h,
            BLOCK_N=call.blocks.grad_keys,
            MODE=call.mode,
            num_warps=call.blocks.warps,
            num_stages=call.blocks.stages,
        )
    return grad_q


def _range_gradients(
    call: _Call, rows: _Rows, keys: Tensor, start_T: Tensor, end_T: Tensor
) -> Tensor:
    """fp32 gradient of keys that query t sees from start_T[t] to end_T[t]; both only grow."""
    count, block = keys.shape[0], call.blocks.key_keys
    if not count or not call.tokens:
        return torch.zeros_like(keys, dtype=torch.float32)
    first = torch.arange(0, count, block, dtype=torch.int32, device=keys.device)
    query_start = torch.searchsorted(end_T, first, right=True, out_int32=True)
    query_end = torch.searchsorted(start_T, first + (block - 1), right=True, out_int32=True)
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
        rows.lse,
        rows.along,
        grad,
        count,
        call.heads,
        call.scale,
        call.root,
        DIM=call.dim,
        ROWS=call.blocks.key_rows,
        BLOCK_N=block,
        num_warps=call.blocks.warps,
        num_stages=call.blocks.stages,
    )
    return grad.sum(0) if parts > 1 else grad[0]


def _pick_gradients(call: _Call, rows: _Rows, entries: Tensor, deterministic: bool) -> Tensor:
    """fp32 gradient of entries of which every query sees its list."""
    grad = torch.zeros_like(entries, dtype=torch.float32)
    chunk = call.tokens
    if deterministic:
        chunk = max(min(chunk, call.blocks.pair_bytes // (4 * call.picks * call.dim)), 1)
        pairs = grad.new_empty(chunk * call.picks, call.dim)
    for first in range(0, call.tokens, max(chunk, 1)):
        tokens = min(chunk, call.tokens - first)
        _grad_picks[(tokens, triton.cdiv(call.picks, call.blocks.key_keys))](
            rows.both,
            entries,
            call.picked,
            rows.lse,
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
            num_warps=call.blocks.warps,
            num_stages=call.blocks.stages,
        )
        if deterministic:
            assert call.picked is not None
            add_pairs(pairs, call.picked[first : first + tokens].flatten(), grad)
    return grad


def add_pairs(pairs: Tensor, entry_P: Tensor, grad: Tensor) -> None:
    """Adds row i of ``pairs`` to row entry_P[i] of ``grad``, for each row of grad in order of i."""
    entry_sorted, order = entry_P.sort(stable=True)
    rows = torch.arange(len(grad) + 1, dtype=torch.int32, device=grad.device)
    bounds = torch.searchsorted(entry_sorted, rows, out_int32=True)
    _sum_picks[(len(grad),)](pairs, order, bounds, grad, DIM=grad.shape[1], BLOCK=16, num_warps=4)


@torch.no_grad()
def entry_mass(
    q_THK: Tensor,
    entries_CK: Tensor,
    lse_TH: Tensor,
    rotation_TR: Tensor,
    ranges: AttentionRanges,
    selected_Tk: Tensor | None = None,
    *,
    norm_eps: float,
    start: int = 0,
    stop: int | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """``model.kernels.attention.entry_mass`` in Triton; the arguments are the same.

    2·H·K operations per query and entry that it sees; reads q once, writes 4 bytes per pair, so
    its floor is a third of forward's at the same entries. Not yet timed.
    """
    backend.attention(q_THK.device, q_THK.dtype, q_THK.shape[-1], asked=True)
    _check_count(q_THK)
    blocks = blocks or blocks_for(q_THK.shape[-1])
    q_THK, entries_CK = q_THK.contiguous(), entries_CK.contiguous()
    call = _Call(q_THK, entries_CK, ranges, selected_Tk, blocks)
    width = call.picks
    if selected_Tk is None:
        stop = entries_CK.shape[0] if stop is None else stop
        width = stop - start
    mass = torch.empty((call.tokens, width), dtype=torch.float32, device=q_THK.device)
    angles = _angles(rotation_TR)
    block_t, block_h = call.rows(blocks.rows)
    if mass.numel():
        assert ranges.entry_end_T is not None
        _mass[(triton.cdiv(call.tokens, block_t),)](
            q_THK,
            entries_CK,
            call.picked,
            angles,
            call.entry_start,
            ranges.entry_end_T.int(),
            lse_TH,
            mass,
            call.tokens,
            call.heads,
            start,
            width,
            norm_eps,
            call.scale,
            DIM=call.dim,
            ROTARY=angles.shape[1],
            BLOCK_T=block_t,
            BLOCK_H=block_h,
            BLOCK_N=blocks.keys,
            MODE=call.mode,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    return mass
