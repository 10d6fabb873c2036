"""The indexer's objective in Triton, forward and backward; compared with ``naive.py``.

The host loops over blocks of queries, because the target's mass m is evaluated per block; the
kernels are in ``loss_kernels_triton.py``.
Forward: a program handles the (token, head) pairs of BLOCK_T tokens and loops over their entries
once. It accumulates the log-sum-exp of the scores s, Σ m, and Σ m · (log m − s), which give

    KL = Σ m · (log m − s) / Σ m − log Σ m + log Σ exp(s).

Backward recomputes the scores. Where each query sees a range, a first kernel writes the gradients
of queries and head weights and that of every score; a second one, whose programs own a block of
keys each, recomputes the scores once more. Where entries are selected, the first kernel also writes
the gradient of every (query, column) pair's key, and these are summed by entry in the order of the
queries. Two runs agree bit for bit; the only array over queries and entries is that of a block.

Per (query, entry) pair 2·I·J FLOPs forward (16.4 thousand at I = 64, J = 128, so 17 ps at an H100's
989 TFLOP/s), 8·I·J backward over ranges and 6·I·J over selected entries, plus 4·I and 8·I in the
vector units; over selected entries backward also writes and reads 4·J bytes per pair (0.31 ns at
3.35 TB/s), which bounds it.

    one sample of        entries, mean    roofline per token, forward + backward    measured
    4K tokens                    512                     8 +    34 ns           not yet timed
    64K tokens                 8 192                   136 +   543 ns           not yet timed
    selected, Flash              512                     8 +   157 ns           not yet timed
    selected, Pro              1 024                    17 +   313 ns           not yet timed

T queries; I index heads; J their width; C entries; k selected entries of a query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from model.kernels import backend
from model.kernels.attention.pairs_triton import add_pairs
from model.kernels.attention.ranges import queries_of_blocks
from model.kernels.indexer.inputs import IndexerInputs
from model.kernels.indexer.kl_target import KLTarget
from model.kernels.indexer.loss_kernels_triton import forward, grad_keys, grad_queries
from model.kernels.workspaces import LOSS_KEY_PROGRAMS, LOSS_PAIR_BYTES, RANGE_PAIRS

_ROWS = 128
"""(token, head) pairs per program."""
_BLOCK_N = 64


def objective(
    inputs: IndexerInputs, target: KLTarget, weight_T: Tensor, needs_grad: bool, **blocks: int
) -> tuple[Tensor, Sequence[Tensor]]:
    """Computes `eager_objective` by the two passes of `query_divergences`, with its ``blocks``."""
    tensors = (inputs.q_TIJ, inputs.keys_CJ, inputs.weights_TI)
    leaves = [x.detach().requires_grad_(needs_grad) for x in tensors]
    with torch.set_grad_enabled(needs_grad):
        divergence_T = query_divergences(IndexerInputs(*leaves), target, **blocks)
        total = (divergence_T * weight_T).sum()
    gradients = torch.autograd.grad(total, leaves) if needs_grad else ()
    return total.detach(), gradients


def query_divergences(
    inputs: IndexerInputs,
    target: KLTarget,
    *,
    rows: int = _ROWS,
    block_n: int = _BLOCK_N,
    range_pairs: int = RANGE_PAIRS,
    pair_bytes: int = LOSS_PAIR_BYTES,
) -> Tensor:
    """Computes KL(p_t ‖ softmax(s_t)) of every query t, fp32 [T]. Backward evaluates p again.

    Args:
        rows, block_n: (token, head) pairs per program and entries per step, powers of two.
        range_pairs: (query, entry) pairs per block, where each query sees a range.
        pair_bytes: bytes of per-pair key gradients of a block, where entries are selected.

    Raises:
        UnsupportedError: a GPU cannot run this device, dtype or shape.
        ValueError: the number of heads or their width is not a power of two.
    """
    q_TIJ = inputs.q_TIJ
    heads, dim = q_TIJ.shape[1:]
    backend.indexer_loss(q_TIJ.device, q_TIJ.dtype, dim, heads)
    if heads & (heads - 1) or dim & (dim - 1):
        raise ValueError(f"{heads} index heads of width {dim}; Triton supports powers of two")
    max_pairs = range_pairs if target.selected_Tk is None else pair_bytes // (4 * dim)
    return _QueryDivergences.apply(
        q_TIJ.contiguous(),
        inputs.keys_CJ.contiguous(),
        inputs.weights_TI.contiguous(),
        _Call(target, rows, block_n, max_pairs),
    )


class _Block:
    """A block of queries and their entries: every kernel's arguments and launch options."""

    def __init__(self, call: _Call, rows: slice, columns: slice, heads: int) -> None:
        self.rows, self.columns = rows, columns
        self.tokens, self.width = rows.stop - rows.start, columns.stop - columns.start
        self.low, self.high = call.low_T[rows], call.high_T[rows]
        self.selected = None if call.selected is None else call.selected[rows]
        self.mass = call.target.mass(rows, columns).float().contiguous()
        is_selected = call.selected is not None
        self.block_t = 1 if is_selected else max(call.rows // heads, 1)
        self.grid = (triton.cdiv(self.tokens, self.block_t),)
        self.sizes = {"BLOCK_T": self.block_t, "BLOCK_N": call.block_n}
        self.options = {"SELECTED": is_selected, "num_warps": 8, "num_stages": 2}


class _Call:
    """Arguments that forward and backward of one call share."""

    def __init__(self, target: KLTarget, rows: int, block_n: int, max_pairs: int) -> None:
        ranges, selected_Tk = target.ranges, target.selected_Tk
        self.target, self.rows, self.block_n = target, rows, block_n
        self.low_T, self.high_T = ranges.int32_entries
        self.selected = None if selected_Tk is None else selected_Tk.int().contiguous()
        self.max_pairs = max_pairs

    def blocks(self, entries: int, heads: int) -> Iterator[_Block]:
        """Yields the blocks of queries, in the order in which all ranks evaluate their mass."""
        for rows, columns in self.target.blocks(entries, self.max_pairs):
            yield _Block(self, rows, columns, heads)


class _QueryDivergences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, keys: Tensor, weights: Tensor, call: _Call) -> Tensor:
        new = torch.empty if len(keys) else torch.zeros
        loss, lse, total = (new(len(q), dtype=torch.float32, device=q.device) for _ in range(3))
        ctx.call = call
        ctx.save_for_backward(q, keys, weights, lse, total)
        heads, dim = q.shape[1:]
        for b in call.blocks(len(keys), heads):
            forward[b.grid](
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
            # Gradients of the scores, or of each (query, column) pair's key.
            is_selected = b.selected is not None
            grad_pairs = grad_keys.new_empty(
                (b.tokens, b.width, dim) if is_selected else b.mass.shape
            )
            grad_queries[b.grid](
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
                grad_pairs,
                b.tokens,
                b.columns.start,
                b.width,
                HEADS=heads,
                DIM=dim,
                **b.sizes,
                **b.options,
            )
            if b.selected is not None:
                add_pairs(grad_pairs, b.selected.flatten(), grad_keys)
            elif b.width:
                grad_keys[b.columns] += _range_gradients(b, q, keys, weights, grad_pairs)
        return grad_q, grad_keys.to(keys.dtype), grad_weights, None


def _range_gradients(b: _Block, q: Tensor, keys: Tensor, weights: Tensor, scores: Tensor) -> Tensor:
    """Returns the fp32 gradient of the block's keys from that of its scores."""
    block_n = b.sizes["BLOCK_N"]
    first = torch.arange(b.columns.start, b.columns.stop, block_n, device=q.device).int()
    query_start, query_end = queries_of_blocks(first, block_n, b.low, b.high)
    parts = min(max(LOSS_KEY_PROGRAMS // len(first), 1), triton.cdiv(b.tokens, b.block_t))
    grad = torch.empty((parts, b.width, q.shape[2]), dtype=torch.float32, device=q.device)
    grad_keys[(len(first), parts)](
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
