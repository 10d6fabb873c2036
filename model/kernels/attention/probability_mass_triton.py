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
    range_tile,
    selected_stages,
    selected_tile,
)
from model.kernels.norm.rotation_triton import cos_sin_of


@triton.jit
def _add_to_mass(q, k, visible, lse2, mass, token, in_bounds, column, width, again, scale_log2):
    """Stores a tile's probabilities, summed over heads, or adds them to what is there ``again``."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    p = tl.exp2(tl.where(visible, s - lse2[:, None], float("-inf")))
    heads: tl.constexpr = q.shape[0] // token.shape[0]
    sums = tl.sum(tl.reshape(p, (token.shape[0], heads, k.shape[0])), 1)
    at = mass + token.to(tl.int64)[:, None] * width + column[None, :]
    mask = in_bounds[:, None] & (column < width)[None, :]
    if again:
        sums += tl.load(at, mask=mask, other=0.0)
    tl.store(at, sums, mask=mask)


@triton.jit
def _zero_mass(mass, token, in_bounds, start, stop, width, BLOCK_N: tl.constexpr):
    """Stores zeros in the columns [start, stop)."""
    for first in tl.range(start, stop, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        at = mass + token.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(at, 0.0, mask=in_bounds[:, None] & (column < stop)[None, :])


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
    SELECTED_STAGES: tl.constexpr,
):
    """Sums probabilities over heads, [BLOCK_T, width], one block of heads after the other.

    The loops have no branch around a copy, so that copies start before earlier ones are used.
    """
    ROWS: tl.constexpr = BLOCK_T * BLOCK_H
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    index = tl.arange(0, ROWS)
    token_T = program * BLOCK_T + tl.arange(0, BLOCK_T)
    exists_T = token_T < tokens
    token = program * BLOCK_T + index // BLOCK_H
    high = tl.load(entry_end + token, mask=token < tokens, other=0)
    first, last = 0, tl.max(high, 0)
    if MODE == ENTRY_RANGE:
        low = tl.load(entry_start + token, mask=token < tokens, other=FAR)
        # Columns [first, last) hold all entries that any of the tokens sees.
        first = tl.maximum(tl.minimum(tl.min(low, 0) - begin, width), 0) // BLOCK_N * BLOCK_N
        last = tl.minimum(last - begin, width)
        _zero_mass(mass, token_T, exists_T, 0, first, width, BLOCK_N)
    end = tl.maximum(first + tl.cdiv(tl.maximum(last - first, 0), BLOCK_N) * BLOCK_N, first)
    _zero_mass(mass, token_T, exists_T, end, width, width, BLOCK_N)
    for head_start in tl.range(0, heads, BLOCK_H):
        head = head_start + index % BLOCK_H
        in_bounds = (token < tokens) & (head < heads)
        row = token * heads + head
        x, _ = load_queries(q, cos_sin, row, token, in_bounds, eps, ROWS, DIM, ROTARY)
        x = x.to(q.dtype.element_ty)
        lse2_R = tl.load(lse2 + row, mask=in_bounds, other=0.0)
        again = head_start > 0
        if MODE == ENTRY_RANGE:
            for start in tl.range(first, end, BLOCK_N):
                column = start + tl.arange(0, BLOCK_N)
                k, visible = range_tile(entries, begin + column, low, high, begin + last, DIM)
                visible &= in_bounds[:, None]
                _add_to_mass(
                    x, k, visible, lse2_R, mass, token_T, exists_T, column, width, again, scale_log2
                )
        else:
            for start in tl.range(0, last, BLOCK_N, num_stages=SELECTED_STAGES):
                column = start + tl.arange(0, BLOCK_N)
                _entry, k = selected_tile(entries, selected, program, column, last, width, DIM)
                visible = (column < last)[None, :] & in_bounds[:, None]
                _add_to_mass(
                    x, k, visible, lse2_R, mass, token_T, exists_T, column, width, again, scale_log2
                )
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
            call.entry_end,
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
            SELECTED_STAGES=selected_stages(blocks.stages),
            **blocks.options,
        )
    return mass
