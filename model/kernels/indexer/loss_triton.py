"""The indexer's objective in Triton; the reference is ``indexer_loss.py``.

The host goes by blocks of queries as the reference does, because the mass is asked for by blocks.
Forward: a program has the pairs (token, head) of BLOCK_T tokens and passes over their entries once,
with the running log-sum-exp of the scores I, Σ m, and Σ m · (log m − I), from which comes

    KL = Σ m · (log m − I) / Σ m − log Σ m + log Σ exp(I).

Backward scores again. Where each query sees a range, a first kernel writes the gradients of
queries and head weights and that of every score; a second one, of which a program has a block of
keys, scores once more. Where entries are selected, the first kernel also writes the gradient of
every (query, place) pair's key, and these are summed by entry in the order of the queries. Two
runs agree bit for bit; the only array of queries and entries is that of a block.

Per pair of query and entry 2·I·J operations forward (16.4 thousand at I = 64, J = 128, so 17 ps at
989 TFLOP/s), 8·I·J backward over ranges and 6·I·J over lists, besides 4·I and 8·I in the vector
units; over lists backward also writes and reads 4·J bytes a pair (0.31 ns at 3.35 TB/s), which is
its floor.

    one sample of        entries, mean    floor per token, forward + backward    measured
    4K tokens                    512                  8 +    34 ns           not yet timed
    64K tokens                 8 192                136 +   543 ns           not yet timed
    lists, Flash                 512                  8 +   157 ns           not yet timed
    lists, Pro                 1 024                 17 +   313 ns           not yet timed
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels import backend
from model.kernels.attention.pairs_triton import add_pairs
from model.kernels.attention.ranges import queries_of_blocks
from model.kernels.indexer.inputs import IndexerInputs
from model.kernels.indexer.kl_target import MIN_PROBABILITY_MASS, KLTarget
from model.kernels.indexer.select_triton import FAR, scored

_ROWS = 128
"""Pairs (token, head) of a program."""
_BLOCK_N = 64
_RANGE_PAIRS = 1 << 26
"""Pairs of a query and an entry of a block, with 4 bytes of mass and 4 of a gradient each."""
_PAIR_BYTES = 1 << 28
"""Gradients of lists' keys held at once."""
_KEY_PROGRAMS = 264
"""Two for each multiprocessor; fewer blocks of keys than that share out their queries."""
_LEAST = tl.constexpr(MIN_PROBABILITY_MASS)


@triton.jit
def _entries(
    at, low, high, picked, token, begin, width, BLOCK_N: tl.constexpr, LISTS: tl.constexpr
):
    """Entries of a step (-1: none) and their columns, [BLOCK_N]; who sees them [T, BLOCK_N]."""
    if LISTS:
        column = at + tl.arange(0, BLOCK_N)
        place = token.to(tl.int64)[:, None] * width + column[None, :]
        listed = tl.load(picked + place, mask=(column < width)[None, :], other=-1)
        n = tl.max(listed, 0)  # a program has one token
        seen = listed >= 0
    else:
        n = at + tl.arange(0, BLOCK_N)
        column = n - begin
        seen = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
        n = tl.where(column < width, n, -1)
    return n, column, seen


@triton.jit
def _rows_of_program(
    entry_start,
    entry_end,
    tokens,
    width,
    BLOCK_T: tl.constexpr,
    HEADS: tl.constexpr,
    LISTS: tl.constexpr,
):
    """Tokens, what each of them sees, rows (token, head), and the first and last place to read."""
    # The last tokens see the most entries and come first.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    token = program * BLOCK_T + tl.arange(0, BLOCK_T)
    row = program * BLOCK_T * HEADS + tl.arange(0, BLOCK_T * HEADS)
    low = tl.load(entry_start + token, mask=token < tokens, other=FAR)
    high = tl.load(entry_end + token, mask=token < tokens, other=0)
    first, end = tl.min(low, 0), tl.max(high, 0)
    if LISTS:
        first, end = 0, width
    return token, low, high, row, first, end


@triton.jit
def _forward(
    q,
    keys,
    weights,
    picked,
    mass,
    entry_start,
    entry_end,
    loss,
    lse,
    total,
    tokens,
    begin,
    width,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LISTS: tl.constexpr,
):
    token, low, high, row, first, end = _rows_of_program(
        entry_start, entry_end, tokens, width, BLOCK_T, HEADS, LISTS
    )
    dim = tl.arange(0, DIM)[None, :]
    held = row < tokens * HEADS
    ready = tl.load(q + row.to(tl.int64)[:, None] * DIM + dim, mask=held[:, None], other=0.0)
    weight = tl.load(weights + row, mask=held, other=0.0).to(tl.float32)
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    sum_exp = tl.zeros((BLOCK_T,), tl.float32)
    sum_mass = tl.zeros((BLOCK_T,), tl.float32)
    cross = tl.zeros((BLOCK_T,), tl.float32)
    for at in tl.range(first, end, BLOCK_N):
        n, column, seen = _entries(at, low, high, picked, token, begin, width, BLOCK_N, LISTS)
        tile = tl.load(keys + n.to(tl.int64)[:, None] * DIM + dim, mask=(n >= 0)[:, None], other=0)
        _, scores = scored(ready, tile, weight, BLOCK_T, HEADS, BLOCK_N)
        place = token.to(tl.int64)[:, None] * width + column[None, :]
        m = tl.load(mass + place, mask=seen, other=0.0)
        m = tl.where(m < _LEAST, 0.0, m)
        sum_mass += tl.sum(m, 1)
        cross += tl.sum(m * (tl.log(tl.where(m == 0.0, 1.0, m)) - scores), 1)
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        sum_exp = sum_exp * tl.exp(top - safe) + tl.sum(tl.exp(scores - safe[:, None]), 1)
        top = new
    row_lse = tl.where(sum_exp > 0.0, top + tl.log(tl.where(sum_exp > 0.0, sum_exp, 1.0)), 0.0)
    divisor = tl.where(sum_mass == 0.0, 1.0, sum_mass)
    divergence = tl.where(sum_mass == 0.0, 0.0, cross / divisor - tl.log(divisor) + row_lse)
    tl.store(loss + token, divergence, mask=token < tokens)
    tl.store(lse + token, row_lse, mask=token < tokens)
    tl.store(total + token, sum_mass, mask=token < tokens)


@triton.jit
def _grad_queries(
    q,
    keys,
    weights,
    picked,
    mass,
    entry_start,
    entry_end,
    lse,
    total,
    grad,
    grad_q,
    grad_weights,
    each,
    tokens,
    begin,
    width,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LISTS: tl.constexpr,
):
    """Of queries and head weights; into ``each`` those of scores, or of a list's keys."""
    token, low, high, row, first, end = _rows_of_program(
        entry_start, entry_end, tokens, width, BLOCK_T, HEADS, LISTS
    )
    dim = tl.arange(0, DIM)[None, :]
    held = row < tokens * HEADS
    own = row.to(tl.int64)[:, None] * DIM + dim
    ready = tl.load(q + own, mask=held[:, None], other=0.0)
    weight = tl.load(weights + row, mask=held, other=0.0).to(tl.float32)
    row_lse = tl.load(lse + token, mask=token < tokens, other=0.0)
    sum_mass = tl.load(total + token, mask=token < tokens, other=0.0)
    factor = tl.load(grad + token, mask=token < tokens, other=0.0).to(tl.float32)
    factor = tl.where(sum_mass == 0.0, 0.0, factor)
    divisor = tl.where(sum_mass == 0.0, 1.0, sum_mass)
    acc = tl.zeros((BLOCK_T * HEADS, DIM), tl.float32)
    acc_weight = tl.zeros((BLOCK_T * HEADS,), tl.float32)
    for at in tl.range(first, end, BLOCK_N):
        n, column, seen = _entries(at, low, high, picked, token, begin, width, BLOCK_N, LISTS)
        tile = tl.load(keys + n.to(tl.int64)[:, None] * DIM + dim, mask=(n >= 0)[:, None], other=0)
        dots, scores = scored(ready, tile, weight, BLOCK_T, HEADS, BLOCK_N)
        place = token.to(tl.int64)[:, None] * width + column[None, :]
        m = tl.load(mass + place, mask=seen, other=0.0)
        target = tl.where(m < _LEAST, 0.0, m) / divisor[:, None]
        share = tl.exp(tl.where(seen, scores - row_lse[:, None], float("-inf")))
        along = (share - target) * factor[:, None]
        spread = tl.broadcast_to(along[:, None, :], (BLOCK_T, HEADS, BLOCK_N))
        spread = tl.reshape(spread, (BLOCK_T * HEADS, BLOCK_N))
        acc_weight += tl.sum(dots * spread, 1)
        grad_dots = tl.where(dots > 0.0, spread * weight[:, None], 0.0).to(tile.dtype)
        acc = tl.dot(grad_dots, tile, acc, input_precision="ieee")
        if LISTS:
            of_keys = tl.dot(tl.trans(grad_dots), ready, input_precision="ieee")
            pair = tl.max(token, 0).to(tl.int64) * width + column
            tl.store(each + pair[:, None] * DIM + dim, of_keys, mask=(n >= 0)[:, None])
        else:
            tl.store(each + place, along, mask=seen)
    tl.store(grad_q + own, acc, mask=held[:, None])
    tl.store(grad_weights + row, acc_weight, mask=held)


@triton.jit
def _grad_keys(
    q,
    keys,
    weights,
    grad_scores,
    entry_start,
    entry_end,
    query_start,
    query_end,
    grad,
    tokens,
    begin,
    width,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of a block of keys, from every num_programs(1)-th block of the queries that see one."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = begin + column
    dim = tl.arange(0, DIM)[None, :]
    known = (column < width)[:, None]
    tile = tl.load(keys + n.to(tl.int64)[:, None] * DIM + dim, mask=known, other=0.0)
    first, last = tl.load(query_start + tl.program_id(0)), tl.load(query_end + tl.program_id(0))
    acc = tl.zeros((BLOCK_N, DIM), tl.float32)
    first += tl.program_id(1) * BLOCK_T
    for at in tl.range(first, last, tl.num_programs(1) * BLOCK_T):
        token = at + tl.arange(0, BLOCK_T)
        row = at * HEADS + tl.arange(0, BLOCK_T * HEADS)
        held = row < tokens * HEADS
        ready = tl.load(q + row.to(tl.int64)[:, None] * DIM + dim, mask=held[:, None], other=0.0)
        weight = tl.load(weights + row, mask=held, other=0.0).to(tl.float32)
        low = tl.load(entry_start + token, mask=token < tokens, other=FAR)
        high = tl.load(entry_end + token, mask=token < tokens, other=0)
        seen = (n[:, None] >= low[None, :]) & (n[:, None] < high[None, :])
        place = token.to(tl.int64)[None, :] * width + column[:, None]
        along = tl.load(grad_scores + place, mask=seen, other=0.0)
        spread = tl.broadcast_to(along[:, :, None], (BLOCK_N, BLOCK_T, HEADS))
        spread = tl.reshape(spread, (BLOCK_N, BLOCK_T * HEADS))
        dots = tl.dot(tile, tl.trans(ready), input_precision="ieee")
        grad_dots = tl.where(dots > 0.0, spread * weight[None, :], 0.0).to(tile.dtype)
        acc = tl.dot(grad_dots, ready, acc, input_precision="ieee")
    out = grad + (tl.program_id(1).to(tl.int64) * width + column)[:, None] * DIM + dim
    tl.store(out, acc, mask=known)


def objective(
    inputs: IndexerInputs, target: KLTarget, share_T: Tensor, needs_grad: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    """Computes `eager_objective` from the two passes of `indexer_loss`."""
    tensors = (inputs.q_TIJ, inputs.keys_CJ, inputs.weights_TI)
    leaves = [x.detach().requires_grad_(needs_grad) for x in tensors]
    with torch.set_grad_enabled(needs_grad):
        total = (indexer_loss(IndexerInputs(*leaves), target) * share_T).sum()
    gradients = torch.autograd.grad(total, leaves) if needs_grad else ()
    return total.detach(), gradients


def indexer_loss(
    inputs: IndexerInputs,
    target: KLTarget,
    *,
    rows: int = _ROWS,
    block_n: int = _BLOCK_N,
    range_pairs: int = _RANGE_PAIRS,
    pair_bytes: int = _PAIR_BYTES,
) -> Tensor:
    """Computes KL(p_t ‖ softmax(I_t)) of every query t, fp32 [T]. Backward asks for p again.

    Args:
        rows, block_n: pairs (token, head) of a program and entries of a step, powers of two.
        range_pairs: pairs of a query and an entry of a block, where each query sees a range.
        pair_bytes: gradients of keys of a block, where entries are selected.

    Raises:
        UnsupportedError: a GPU cannot run this device, dtype or shape.
        ValueError: the number of heads or their width is not a power of two.
    """
    q_TIJ = inputs.q_TIJ
    heads, dim = q_TIJ.shape[1:]
    backend.indexer_loss(q_TIJ.device, q_TIJ.dtype, dim, heads, asked=True)
    if heads & (heads - 1) or dim & (dim - 1):
        raise ValueError(f"{heads} index heads of width {dim}; Triton scores powers of two")
    max_pairs = range_pairs if target.selected_Tk is None else pair_bytes // (4 * dim)
    return _IndexerLoss.apply(
        q_TIJ.contiguous(),
        inputs.keys_CJ.contiguous(),
        inputs.weights_TI.contiguous(),
        _Call(target, rows, block_n, max_pairs),
    )


class _Block:
    """Some queries and their entries: what every kernel is given, and how it is launched."""

    def __init__(self, call: _Call, rows: slice, columns: slice, heads: int) -> None:
        self.rows, self.columns = rows, columns
        self.tokens, self.width = rows.stop - rows.start, columns.stop - columns.start
        self.low, self.high = call.low_T[rows], call.high_T[rows]
        self.selected = None if call.selected is None else call.selected[rows]
        self.mass = call.target.mass(rows, columns).float().contiguous()
        lists = call.selected is not None
        self.block_t = 1 if lists else max(call.rows // heads, 1)
        self.grid = (triton.cdiv(self.tokens, self.block_t),)
        self.sizes = {"BLOCK_T": self.block_t, "BLOCK_N": call.block_n}
        self.options = {"LISTS": lists, "num_warps": 8, "num_stages": 2}


class _Call:
    """What forward and backward of one call share."""

    def __init__(self, target: KLTarget, rows: int, block_n: int, max_pairs: int) -> None:
        ranges, selected_Tk = target.ranges, target.selected_Tk
        assert ranges.entry_start_T is not None and ranges.entry_end_T is not None
        self.target, self.rows, self.block_n = target, rows, block_n
        self.low_T, self.high_T = ranges.entry_start_T.int(), ranges.entry_end_T.int()
        self.selected = None if selected_Tk is None else selected_Tk.int().contiguous()
        self.max_pairs = max_pairs

    def blocks(self, entries: int, heads: int) -> Iterator[_Block]:
        for rows, columns in self.target.blocks(entries, self.max_pairs):
            yield _Block(self, rows, columns, heads)


class _IndexerLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, keys: Tensor, weights: Tensor, call: _Call) -> Tensor:
        new = torch.empty if len(keys) else torch.zeros
        loss, lse, total = (new(len(q), dtype=torch.float32, device=q.device) for _ in range(3))
        ctx.call = call
        ctx.save_for_backward(q, keys, weights, lse, total)
        heads, dim = q.shape[1:]
        for b in call.blocks(len(keys), heads):
            _forward[b.grid](
                q[b.rows],
                keys,
                weights[b.rows],
                b.selected,
                b.mass,
                b.low,
                b.high,
                loss[b.rows],
                lse[b.rows],
                total[b.rows],
                b.tokens,
                b.columns.start,
                b.width,
                HEADS=heads,
                DIM=dim,
                **b.sizes,
                **b.options,
            )
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, keys, weights, lse, total = ctx.saved_tensors
        new = torch.empty_like if len(keys) else torch.zeros_like
        grad, grad_q, grad_weights = grad.contiguous(), new(q), new(weights)
        grad_keys = torch.zeros_like(keys, dtype=torch.float32)
        heads, dim = q.shape[1:]
        for b in ctx.call.blocks(len(keys), heads):
            # Of the scores, or of the key of each place of a list.
            lists = b.selected is not None
            each = grad_keys.new_empty((b.tokens, b.width, dim) if lists else b.mass.shape)
            _grad_queries[b.grid](
                q[b.rows],
                keys,
                weights[b.rows],
                b.selected,
                b.mass,
                b.low,
                b.high,
                lse[b.rows],
                total[b.rows],
                grad[b.rows],
                grad_q[b.rows],
                grad_weights[b.rows],
                each,
                b.tokens,
                b.columns.start,
                b.width,
                HEADS=heads,
                DIM=dim,
                **b.sizes,
                **b.options,
            )
            if b.selected is not None:
                add_pairs(each, b.selected.flatten(), grad_keys)
            elif b.width:
                grad_keys[b.columns] += _range_gradients(b, q, keys, weights, each)
        return grad_q, grad_keys.to(keys.dtype), grad_weights, None


def _range_gradients(b: _Block, q: Tensor, keys: Tensor, weights: Tensor, scores: Tensor) -> Tensor:
    """fp32 gradient of the block's keys from that of its scores."""
    block_n = b.sizes["BLOCK_N"]
    first = torch.arange(b.columns.start, b.columns.stop, block_n, device=q.device).int()
    query_start, query_end = queries_of_blocks(first, block_n, b.low, b.high)
    parts = min(max(_KEY_PROGRAMS // len(first), 1), triton.cdiv(b.tokens, b.block_t))
    grad = torch.empty((parts, b.width, q.shape[2]), dtype=torch.float32, device=q.device)
    _grad_keys[(len(first), parts)](
        q[b.rows],
        keys,
        weights[b.rows],
        scores,
        b.low,
        b.high,
        query_start,
        query_end,
        grad,
        b.tokens,
        b.columns.start,
        b.width,
        HEADS=q.shape[1],
        DIM=q.shape[2],
        **b.sizes,
        num_warps=8,
        num_stages=2,
    )
    return grad.sum(0)
