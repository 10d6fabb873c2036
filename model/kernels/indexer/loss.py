"""The indexer's objective: its scores against the attention that entries got (report 2.3.1).

For every query, KL(p ‖ softmax(I)) over a set of entries: I are the indexer's scores, and p is the
*mass* that core attention gave to each entry, summed over heads and divided by its sum over the
set. The set is all entries that the query sees (the dense phase), or those selected for it. Only
the indexer's queries, keys and head weights get a gradient; p is a constant. Both passes go by
blocks of queries and backward scores again, so nothing of size [T, C] is ever kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from model.kernels import backend
from model.kernels.attention.attention import entry_mass
from model.kernels.attention.ranges import AttentionRanges

Mass = Callable[[Any, slice], Tensor]
"""mass(rows, columns): fp32 attention summed over all heads, [rows, columns] of queries (a slice or
their numbers) and of entries, or of places in their lists where the entries are selected. Zero
where nothing is seen."""

LEAST_MASS = torch.finfo(torch.float32).tiny
"""Less is no mass: a logarithm or a quotient of it would not be a number on every device."""

_CPU_SCORES, _GPU_SCORES = 1 << 19, 1 << 27
"""Per-head scores held at once: a core's cache, or half a gigabyte."""
_KEPT_PAIRS = 1 << 20
"""Pairs of a query and an entry looked at at once where a selection is measured."""


def indexer_loss(
    q_TIJ: Tensor,
    keys_CJ: Tensor,
    weights_TI: Tensor,
    mass: Mass,
    ranges: AttentionRanges,
    selected_Tk: Tensor | None = None,
) -> Tensor:
    """KL(p_t ‖ softmax(I_t)) of every query t with I_ts = Σ_h w_h · ReLU(q_h · k_s).

    Args:
        q_TIJ, keys_CJ, weights_TI: as `select_topk` has them; detach what they were computed from
            where the indexer alone is to learn.
        mass: the teacher, see `Mass`; `attention_mass` makes it where queries and heads are whole.
            Ranks with as many queries and entries ask for the same number of rows in the same
            order, so that a mass may be a sum over ranks. Backward asks again.
        ranges: its entry ranges are used.
        selected_Tk: the set of each query (-1: none); without it all that the query sees.

    Returns:
        fp32 [T], to be summed and divided by the counted tokens. A query with an empty set, or
        whose set got no mass, contributes 0 and has no gradient.
    """
    heads, dim = q_TIJ.shape[1:]
    if backend.indexer_loss(q_TIJ.device, q_TIJ.dtype, dim, heads).name == "triton":
        from model.kernels.indexer import loss_triton as indexer_loss_triton

        return indexer_loss_triton.indexer_loss(
            q_TIJ, keys_CJ, weights_TI, mass, ranges, selected_Tk
        )
    return reference_indexer_loss(q_TIJ, keys_CJ, weights_TI, mass, ranges, selected_Tk)


def reference_indexer_loss(
    q_TIJ: Tensor,
    keys_CJ: Tensor,
    weights_TI: Tensor,
    mass: Mass,
    ranges: AttentionRanges,
    selected_Tk: Tensor | None = None,
) -> Tensor:
    """`indexer_loss` in plain PyTorch, on any device."""
    return _IndexerLoss.apply(q_TIJ, keys_CJ, weights_TI, mass, ranges, selected_Tk)


def indexer_objective(
    q_TIJ: Tensor,
    keys_CJ: Tensor,
    weights_TI: Tensor,
    mass: Mass,
    ranges: AttentionRanges,
    share_T: Tensor,
    selected_Tk: Tensor | None = None,
) -> Tensor:
    """Σ_t share_t · KL_t as a 0-dim tensor, with the KL and the arguments of `indexer_loss`.

    The gradient is formed in forward, while a block's scores and mass are there: the mass is asked
    for then alone, so that nothing of the teacher is held until backward, and a mass that is a sum
    over ranks sends nothing in backward.
    """
    arguments = (q_TIJ, keys_CJ, weights_TI, mass, ranges, share_T, selected_Tk)
    return _Objective.apply(*arguments, torch.is_grad_enabled())


def attention_mass(
    q_THK: Tensor,
    entries_CK: Tensor,
    lse_TH: Tensor,
    rotation_TR: Tensor,
    ranges: AttentionRanges,
    selected_Tk: Tensor | None = None,
    *,
    norm_eps: float,
) -> Mass:
    """The teacher from what `attention_with_lse` had and returned; all without a gradient."""
    q_THK, entries_CK, lse_TH = q_THK.detach(), entries_CK.detach(), lse_TH.detach()

    def mass(rows: slice | Tensor, columns: slice) -> Tensor:
        part = (q_THK[rows], entries_CK, lse_TH[rows], rotation_TR[rows], ranges.of(rows))
        if selected_Tk is not None:
            return entry_mass(*part, selected_Tk[rows, columns], norm_eps=norm_eps)
        return entry_mass(*part, norm_eps=norm_eps, start=columns.start, stop=columns.stop)

    return mass


@torch.no_grad()
def kept_mass(
    mass: Mass, ranges: AttentionRanges, selected_Tk: Tensor | None, entries: int
) -> tuple[Tensor, Tensor]:
    """How much a selection keeps: mass of the selected and of all entries, each fp32 [T].

    Their quotient, of sums over queries, is the recall of the choice. ``mass`` is that of all
    entries, not of a list; its heads' denominators are those of the attention that it came from.
    Without ``selected_Tk`` all are kept. ``entries`` is their number, C.
    """
    assert ranges.entry_start_T is not None
    all_T = torch.zeros(len(ranges.entry_start_T), device=ranges.entry_start_T.device)
    kept_T = torch.zeros_like(all_T)
    for rows, columns in blocks(ranges, entries, None, _KEPT_PAIRS):
        mass_nc = mass(rows, columns)  # asked for in any case: it may be a sum over ranks
        all_T[rows] = mass_nc.sum(1)
        if selected_Tk is not None and columns.start < columns.stop:
            index_nk = selected_Tk[rows].long()
            picked_nk = mass_nc.gather(1, (index_nk - columns.start).clamp(min=0))
            kept_T[rows] = picked_nk.masked_fill(index_nk < 0, 0.0).sum(1)
    return all_T.clone() if selected_Tk is None else kept_T, all_T


def blocks(
    ranges: AttentionRanges, entries: int, picks: int | None, most: int
) -> Iterator[tuple[slice, slice]]:
    """Queries of a block, and the entries that one of them sees or the places in their lists.

    A block has at most ``most`` pairs, or one query. How many queries it has depends on sizes
    alone: ranks with other samples take the same steps.
    """
    assert ranges.host_entry_start_T is not None and ranges.host_entry_end_T is not None
    start_T, end_T = ranges.host_entry_start_T, ranges.host_entry_end_T
    step = max(most // max(entries if picks is None else picks, 1), 1)
    for first in range(0, len(start_T) if entries else 0, step):
        rows = slice(first, min(first + step, len(start_T)))
        if picks is not None:
            yield rows, slice(0, picks)
            continue
        low = int(start_T[first])
        yield rows, slice(low, max(int(end_T[rows].max()), low))


_Inputs = tuple[Tensor, Tensor, Tensor]
"""The indexer's queries, keys and head weights."""


class _Block:
    """Scores of some queries, and the share of the mass that each entry should have."""

    def __init__(
        self,
        inputs: _Inputs,
        mass: Mass,
        ranges: AttentionRanges,
        selected: Tensor | None,
        rows: slice,
        columns: slice,
    ) -> None:
        q, keys, weights = inputs
        exact = torch.promote_types(q.dtype, torch.float32)
        self.rows, self.columns = rows, columns
        self.q, self.weights = q[rows].to(exact), weights[rows].to(exact)
        self.index = None
        if selected is None:
            assert ranges.entry_start_T is not None and ranges.entry_end_T is not None
            index = torch.arange(columns.start, columns.stop, device=q.device)
            low, high = ranges.entry_start_T[rows, None], ranges.entry_end_T[rows, None]
            self.seen = (index >= low) & (index < high)
            self.keys = keys[columns].to(exact)
            dots = (self.q.flatten(0, 1) @ self.keys.t()).view(*self.q.shape[:2], -1)
        else:
            self.seen = selected[rows] >= 0
            self.index = selected[rows].clamp(min=0).flatten()
            self.keys = keys.index_select(0, self.index).to(exact).view(*self.seen.shape, -1)
            dots = torch.bmm(self.q, self.keys.transpose(1, 2))
        self.dots = dots.relu_()
        self.scores = torch.bmm(self.weights[:, None], self.dots)[:, 0]
        target = mass(rows, columns).to(exact)
        target = target.masked_fill(~self.seen | (target < LEAST_MASS), 0.0)
        self.total = target.sum(1)
        self.target = target / self.total.clamp(min=LEAST_MASS)[:, None]

    def divergence(self) -> tuple[Tensor, Tensor]:
        """KL and log Σ exp(I), each [n]."""
        lse = self.scores.masked_fill(~self.seen, float("-inf")).logsumexp(1)
        cross = (torch.xlogy(self.target, self.target) - self.target * self.scores).sum(1)
        return (cross + lse).masked_fill(self.total == 0, 0.0), lse

    def gradients(self, lse: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of queries, head weights, and keys: [c, J], or [n · k, J] for those of the lists."""
        share = (self.scores - lse[:, None]).exp()
        grad_scores = (share - self.target).mul_(grad[:, None])
        grad_scores.masked_fill_(~self.seen | (self.total == 0)[:, None], 0.0)
        grad_weights = torch.bmm(self.dots, grad_scores[..., None])[..., 0]
        grad_dots = grad_scores[:, None] * self.weights[..., None] * (self.dots > 0)
        if self.index is None:
            flat = grad_dots.flatten(0, 1)
            grad_q = (flat @ self.keys).view_as(self.q)
            return grad_q, grad_weights, flat.t() @ self.q.flatten(0, 1)
        grad_keys = torch.bmm(grad_dots.transpose(1, 2), self.q)
        return torch.bmm(grad_dots, self.keys), grad_weights, grad_keys.flatten(0, 1)


class _Gradients:
    """Of queries, keys and head weights, over all blocks."""

    def __init__(self, inputs: _Inputs) -> None:
        q, keys, weights = inputs
        self.q, self.weights = torch.zeros_like(q), torch.zeros_like(weights)
        self.keys = torch.zeros_like(keys, dtype=torch.promote_types(q.dtype, torch.float32))
        self.dtype = keys.dtype

    def add(self, block: _Block, lse_n: Tensor, grad_n: Tensor) -> None:
        """``grad_n`` is that of each query's divergence."""
        rows = block.rows
        self.q[rows], self.weights[rows], grad_keys = block.gradients(lse_n, grad_n)
        if block.index is None:
            self.keys[block.columns] += grad_keys
        else:
            self.keys.index_add_(0, block.index, grad_keys)

    def of_inputs(self) -> _Inputs:
        return self.q, self.keys.to(self.dtype), self.weights


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        keys: Tensor,
        weights: Tensor,
        mass: Mass,
        ranges: AttentionRanges,
        share: Tensor,
        selected: Tensor | None,
        grad_enabled: bool,
    ) -> Tensor:
        inputs, task = (q, keys, weights), (mass, ranges, share, selected)
        needs_grad = grad_enabled and any(ctx.needs_input_grad[:3])
        if backend.indexer_loss(q.device, q.dtype, q.shape[2], q.shape[1]).name == "triton":
            total, gradients = _by_backward(inputs, *task, needs_grad)
        else:
            total, gradients = _in_one_pass(inputs, *task, needs_grad)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (gradient * grad.to(gradient.dtype) for gradient in ctx.saved_tensors)
        return *gradients, *[None] * 5


def _by_backward(
    inputs: _Inputs,
    mass: Mass,
    ranges: AttentionRanges,
    share: Tensor,
    selected: Tensor | None,
    needs_grad: bool,
) -> tuple[Tensor, Sequence[Tensor]]:
    """The objective and its gradients from the two passes of `indexer_loss`."""
    q, keys, weights = leaves = [x.detach().requires_grad_(needs_grad) for x in inputs]
    with torch.set_grad_enabled(needs_grad):
        total = (indexer_loss(q, keys, weights, mass, ranges, selected) * share).sum()
    gradients = torch.autograd.grad(total, leaves) if needs_grad else ()
    return total.detach(), gradients


def _in_one_pass(
    inputs: _Inputs,
    mass: Mass,
    ranges: AttentionRanges,
    share: Tensor,
    selected: Tensor | None,
    needs_grad: bool,
) -> tuple[Tensor, Sequence[Tensor]]:
    """The objective and its gradients, block by block."""
    q, keys, _ = inputs
    exact = torch.promote_types(q.dtype, torch.float32)
    total = torch.zeros((), dtype=exact, device=q.device)
    gradients = _Gradients(inputs) if needs_grad else None
    for rows, columns in _blocks_of(q, keys, ranges, selected):
        block = _Block(inputs, mass, ranges, selected, rows, columns)
        loss_n, lse_n = block.divergence()
        total += (loss_n * share[rows]).sum()
        if gradients is not None:
            gradients.add(block, lse_n, share[rows])
    return total, () if gradients is None else gradients.of_inputs()


class _IndexerLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        keys: Tensor,
        weights: Tensor,
        mass: Mass,
        ranges: AttentionRanges,
        selected: Tensor | None,
    ) -> Tensor:
        exact = torch.promote_types(q.dtype, torch.float32)
        loss_T, lse_T = (torch.zeros(len(q), dtype=exact, device=q.device) for _ in range(2))
        ctx.mass, ctx.ranges = mass, ranges
        ctx.save_for_backward(q, keys, weights, selected, lse_T)
        for rows, columns in _blocks_of(q, keys, ranges, selected):
            block = _Block((q, keys, weights), mass, ranges, selected, rows, columns)
            loss_T[rows], lse_T[rows] = block.divergence()
        return loss_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        q, keys, weights, selected, lse_T = ctx.saved_tensors
        inputs = (q, keys, weights)
        gradients = _Gradients(inputs)
        for rows, columns in _blocks_of(q, keys, ctx.ranges, selected):
            block = _Block(inputs, ctx.mass, ctx.ranges, selected, rows, columns)
            gradients.add(block, lse_T[rows], grad_T[rows])
        return *gradients.of_inputs(), None, None, None


def _blocks_of(
    q: Tensor, keys: Tensor, ranges: AttentionRanges, selected: Tensor | None
) -> Iterator[tuple[slice, slice]]:
    most = (_CPU_SCORES if q.device.type == "cpu" else _GPU_SCORES) // q.shape[1]
    return blocks(ranges, len(keys), None if selected is None else selected.shape[1], most)
