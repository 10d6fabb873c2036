"""The indexer's selection of entries in Triton; compared with ``naive.py``.

A program scores BLOCK_T tokens, all heads at once, against one block of visible entries after the
other: [BLOCK_T · I, J] times [J, BLOCK_N], ReLU, weighted sum over heads. A score and its entry
become one int64 whose order is (score, lower entry first), as in the eager version, so that ties
are broken alike. The k best so far stay in registers, sorted. What is above the last of them is
appended to a small scratch buffer (which stays in cache). Once that has k candidates, they are
sorted ascending, and the elementwise maximum with the k best, bitonic-merged, gives the new k best:
of n entries in random order, k · (1 + ln(n / k)) get there. No [T, C] matrix exists.

Per query and visible entry 2·I·J FLOPs in tensor cores (16.4 thousand at I = 64, J = 128, so 17 ps
at an H100's 989 TFLOP/s) and 3·I in the vector units, plus the compare steps of few sorts; a
query reads 2·I·(J + 2) bytes of memory once and writes 4·k, while keys come from L2. Flash and Pro
differ only in k.

    one sample of    visible entries, mean    roofline per token    measured
    4K tokens                    512                9 ns           not yet timed
    64K tokens                 8 192              136 ns           not yet timed
    1M tokens                131 072             2172 ns           not yet timed

T queries; I index heads (HEADS); J their width (DIM); C entries; k selected entries of a query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels import backend
from model.kernels.attention import AttentionRanges
from model.kernels.indexer.inputs import IndexerInputs
from model.kernels.workspaces import SELECTED_TOKENS

_ROWS = 128
"""(token, head) pairs per program."""
_THREADS = 256
_MAX_BEST = 2048
"""Max best entries of all tokens of a program, which stay in registers."""
_TWO_PROGRAMS = 1024
"""With at most so many, a thread may have 128 registers, so that one program of an SM multiplies
while another one sorts."""
_LOWEST = tl.constexpr(-(2**63))
FAR = tl.constexpr(2**31 - 1)


@triton.jit
def scored(q_tile, tile, weight, BLOCK_T: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Computes ReLU(q · k) of all heads [T · I, BLOCK_N], and the scores [T, BLOCK_N]."""
    dots = tl.maximum(tl.dot(q_tile, tl.trans(tile), input_precision="ieee"), 0.0)
    weighted = tl.reshape(dots * weight[:, None], (BLOCK_T, HEADS, BLOCK_N))
    return dots, tl.sum(weighted, 1)


@triton.jit
def _ordered(scores, entry, visible):
    """Returns int64 keys in the order of (score, lower entry first), the lowest if not visible."""
    scores = tl.where(scores == 0.0, 0.0, scores)  # -0.0 and 0.0 are equal
    bits = scores.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - entry).to(tl.int64)
    return tl.where(visible, key, _LOWEST)


@triton.jit
def _merged(best, strip, count):
    """Merges the last candidates of a strip [T, 2 · BEST], up to BEST a token, into the best.

    Returns the best in descending order, the last of them, which other candidates have to exceed,
    and how many candidates are left, both [T, 1].
    """
    BEST: tl.constexpr = best.shape[1]
    left = tl.maximum(count - BEST, 0)
    at = left + tl.arange(0, BEST)[None, :]
    tl.debug_barrier()  # other threads wrote the strip, and will write it again
    new = tl.load(strip + at, mask=at < count, other=-(2**63))
    tl.debug_barrier()
    best = tl.bitonic_merge(tl.maximum(best, tl.sort(new)), descending=True)
    return best, tl.min(best, 1, keep_dims=True), left


@triton.jit(do_not_specialize=["first_token", "tokens"])
def _select(
    q,
    keys,
    weights,
    entry_start,
    entry_end,
    strip,
    selected,
    first_token,
    tokens,
    k,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BEST: tl.constexpr,
):
    # The last tokens see the most entries and come first.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    token = first_token + program * BLOCK_T + tl.arange(0, BLOCK_T)
    in_bounds = token < tokens
    low = tl.load(entry_start + token, mask=in_bounds, other=FAR)
    high = tl.load(entry_end + token, mask=in_bounds, other=0)
    first, end = tl.min(low, 0), tl.max(high, 0)
    # Where no query sees more than k entries there is nothing to select.
    end = tl.where(tl.max(high - low, 0) <= k, first, end)
    row = (first_token + program * BLOCK_T) * HEADS + tl.arange(0, BLOCK_T * HEADS)
    in_rows = row < tokens * HEADS
    dim = tl.arange(0, DIM)[None, :]
    q_tile = tl.load(q + row.to(tl.int64)[:, None] * DIM + dim, mask=in_rows[:, None], other=0.0)
    weight = tl.load(weights + row, mask=in_rows, other=0.0).to(tl.float32)
    lane = tl.arange(0, BEST)[None, :]
    # int64, because the scratch buffer of many programs is large
    own = strip + (program * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None] * (2 * BEST)
    best = tl.full((BLOCK_T, BEST), -(2**63), tl.int64)
    least = tl.full((BLOCK_T, 1), -(2**63), tl.int64)
    count = tl.zeros((BLOCK_T, 1), tl.int32)
    for base in tl.range(first, end, BEST):
        # Without a branch or barrier, so that keys are copied ahead.
        for step in tl.range(0, BEST, BLOCK_N):
            n = base + step + tl.arange(0, BLOCK_N)
            at = n.to(tl.int64)[:, None] * DIM + dim
            tile = tl.load(keys + at, mask=(n < end)[:, None], other=0.0)
            _, scores = scored(q_tile, tile, weight, BLOCK_T, HEADS, BLOCK_N)
            visible = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
            candidate = _ordered(scores, n[None, :], visible)
            better = (candidate > least).to(tl.int32)
            place = count + tl.cumsum(better, 1) - 1
            tl.store(own + place, candidate, mask=better == 1)
            count += tl.sum(better, 1, keep_dims=True)
        if tl.max(count) >= BEST:
            best, least, count = _merged(best, own, count)
    best, _, _ = _merged(best, own, count)
    entry = 0x7FFFFFFF - (best & 0xFFFFFFFF)
    entry = tl.where(best == _LOWEST, -1, entry).to(tl.int32)
    every = low[:, None] + lane
    every = tl.where(every < high[:, None], every, -1)
    entry = tl.where((high - low)[:, None] <= k, every, entry)
    out = selected + token.to(tl.int64)[:, None] * k + lane
    tl.store(out, entry, mask=in_bounds[:, None] & (lane < k))


@torch.no_grad()
def select_topk(
    inputs: IndexerInputs,
    ranges: AttentionRanges,
    k: int,
    *,
    rows: int = _ROWS,
    block_n: int = 64,
) -> Tensor:
    """Computes ``model.kernels.indexer.select_topk`` in Triton.

    Args:
        rows, block_n: (token, head) pairs per program and entries per step, powers of two.

    Returns:
        int32 [T, k]. A query that sees at most k entries gets them in index order; others in
        descending order of score.

    Raises:
        UnsupportedError: a GPU cannot run this device, dtype or shape.
        ValueError: the number of heads or their width is not a power of two.
    """
    q_TIJ, keys_CJ, weights_TI = inputs.q_TIJ, inputs.keys_CJ, inputs.weights_TI
    tokens, heads, dim = q_TIJ.shape
    backend.indexer(q_TIJ.device, q_TIJ.dtype, dim, heads, k)
    if heads & (heads - 1) or dim & (dim - 1):
        raise ValueError(f"{heads} index heads of width {dim}; Triton supports powers of two")
    selected_Tk = torch.empty((tokens, k), dtype=torch.int32, device=q_TIJ.device)
    best = max(triton.next_power_of_2(k), block_n)
    block_t = max(min(rows // heads, _MAX_BEST // best), 1)
    best = max(best, _THREADS // block_t)  # Triton 3.7 cannot reduce what it sorted with fewer
    start_T, end_T = ranges.int32_entries
    chunk = triton.cdiv(min(tokens, SELECTED_TOKENS), block_t) * block_t
    strip = torch.empty((chunk, 2 * best), dtype=torch.int64, device=q_TIJ.device)
    for first in range(0, tokens, max(chunk, 1)):
        _select[(triton.cdiv(min(chunk, tokens - first), block_t),)](
            q_TIJ.contiguous(),
            keys_CJ.contiguous(),
            weights_TI.contiguous(),
            start_T,
            end_T,
            strip,
            selected_Tk,
            first,
            tokens,
            k,
            HEADS=heads,
            DIM=dim,
            BLOCK_T=block_t,
            BLOCK_N=block_n,
            BEST=best,
            num_warps=_THREADS // 32,
            num_stages=3,
            maxnreg=128 if block_t * best <= _TWO_PROGRAMS else None,
        )
    return selected_Tk
