"""The entries' attention probability mass in Triton, for the indexer's KL target.

Probabilities are recomputed from the saved log-sum-exp and are summed over heads, one block of
heads after the other in one program, so that two runs agree bit for bit.

2·H·K FLOPs per query and visible entry; reads q once and writes 4 bytes per (query, entry) pair.
Roofline bounds: docs/performance.md. Not yet timed.

T queries; H heads; K their width (DIM); R rotary dims (ROTARY); C entries; k selected entries of a
query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.attention.inputs import AttentionInputs
from model.kernels.attention.parts_triton import (
    ENTRY_RANGE,
    FAR,
    Blocks,
    Call,
    blocks_for,
    check,
    load_queries,
    tile,
)
from model.kernels.norm.rotation_triton import cos_sin_of


@triton.jit(do_not_specialize=["tokens", "begin", "width"])
def _mass(
    q,
    entries,
    selected,
    cos_sin,
    entry_start,
    entry_end,
    lse2,
    mass,
    tokens,
    heads,
    begin,
    width,
    eps,
    scale_log2,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MODE: tl.constexpr,
):
    """Sums probabilities over heads, [BLOCK_T, width], one block of heads after the other."""
    ROWS: tl.constexpr = BLOCK_T * BLOCK_H
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    index = tl.arange(0, ROWS)
    token_of_block = program * BLOCK_T + tl.arange(0, BLOCK_T)
    token = program * BLOCK_T + index // BLOCK_H
    low = tl.load(entry_start + token, mask=token < tokens, other=FAR)
    high = tl.load(entry_end + token, mask=token < tokens, other=0)
    first, end = tl.min(low, 0), tl.max(high, 0)
    for head_start in tl.range(0, heads, BLOCK_H):
        head = head_start + index % BLOCK_H
        in_bounds = (token < tokens) & (head < heads)
        row = token * heads + head
        normed_q, _ = load_queries(q, cos_sin, row, token, in_bounds, eps, ROWS, DIM, ROTARY)
        normed_q = normed_q.to(q.dtype.element_ty)
        row_lse2 = tl.load(lse2 + row, mask=in_bounds, other=0.0)
        for start in tl.range(0, width, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            if MODE == ENTRY_RANGE:
                n = begin + column
                any_visible = (begin + start < end) & (begin + start + BLOCK_N > first)
                visible = (
                    (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None]) & in_bounds[:, None]
                )
            else:
                at = (program * BLOCK_T).to(tl.int64) * width
                n = tl.load(selected + at + column, mask=column < width, other=-1)
                any_visible = tl.max(n, 0) >= 0
                visible = (n >= 0)[None, :] & in_bounds[:, None]
            mass_tile = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            if any_visible:
                k = tile(entries, n, (n >= 0) & (column < width) & (n < end), DIM)
                s = tl.dot(normed_q, tl.trans(k), input_precision="ieee") * scale_log2
                p = tl.exp2(tl.where(visible, s - row_lse2[:, None], float("-inf")))
                mass_tile = tl.sum(tl.reshape(p, (BLOCK_T, BLOCK_H, BLOCK_N)), 1)
            at = mass + token_of_block.to(tl.int64)[:, None] * width + column[None, :]
            in_output = (token_of_block < tokens)[:, None] & (column < width)[None, :]
            if head_start > 0:
                mass_tile += tl.load(at, mask=in_output, other=0.0)
            tl.store(at, mass_tile, mask=in_output)
        tl.debug_barrier()


@torch.no_grad()
def entry_probability_mass(
    inputs: AttentionInputs,
    lse2_TH: Tensor,
    *,
    start: int = 0,
    stop: int | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """Computes ``model.kernels.attention.entry_probability_mass`` in Triton.

    Raises:
        UnsupportedError, ValueError: as ``forward_triton.attention``.
    """
    assert inputs.entries_CK is not None
    check(inputs.q_THK)
    blocks = blocks or blocks_for(inputs.q_THK.shape[-1])
    q_THK, entries_CK = inputs.q_THK.contiguous(), inputs.entries_CK.contiguous()
    ranges, selected_Tk = inputs.ranges, inputs.selected_Tk
    call = Call(q_THK, entries_CK, ranges, selected_Tk, blocks)
    width = call.num_selected
    if selected_Tk is None:
        stop = entries_CK.shape[0] if stop is None else stop
        width = stop - start
    mass = torch.empty((call.tokens, width), dtype=torch.float32, device=q_THK.device)
    cos_sin = cos_sin_of(inputs.rotation_Tr)
    block_t, block_h = call.rows(blocks.rows)
    if mass.numel():
        _mass[(triton.cdiv(call.tokens, block_t),)](
            q_THK,
            entries_CK,
            call.selected,
            cos_sin,
            call.entry_start,
            ranges.int32_entries[1],
            lse2_TH,
            mass,
            call.tokens,
            call.heads,
            start,
            width,
            inputs.norm_eps,
            call.scale_log2,
            DIM=call.dim,
            ROTARY=cos_sin.shape[1],
            BLOCK_T=block_t,
            BLOCK_H=block_h,
            BLOCK_N=blocks.keys,
            MODE=call.mode,
            **blocks.options,
        )
    return mass
