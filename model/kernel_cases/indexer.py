"""The indexer's selection of entries and its objective.

T queries; I index heads; J their width; C entries; k selected entries of a query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kernel_cases.case import (
    Blocks,
    Case,
    MakeCase,
    Selection,
    Sizes,
    Work,
    layers_of,
    random_selection,
    sees,
    visible_entries,
)
from model.kernels.attention.naive import naive_selection_mask
from model.kernels.indexer import IndexerInputs, KLTarget, indexer_objective, select_topk
from model.kernels.indexer.naive import naive_query_divergences, naive_scores


def indexer_cases(sizes: Sizes) -> Iterator[MakeCase]:
    """Yields the selection of k entries, and at small sizes that of fewer."""
    k, most = sizes.config.index_topk, int(visible_entries(sizes, "csa").max(initial=0))
    for count in dict.fromkeys([k, min(k, max(most // 2, 1))] if sizes.dense else [k]):
        yield partial(selection_case, sizes, count)


def indexer_loss_cases(sizes: Sizes) -> Iterator[MakeCase]:
    """Yields the objective over all entries and over selected ones."""
    k, most = sizes.config.index_topk, int(visible_entries(sizes, "csa").max(initial=0))
    for count in (None, min(k, max(most // 2, 1)) if sizes.dense else k):
        yield partial(loss_case, sizes, count)


def block_choices(config: ModelConfig) -> tuple[Blocks, ...]:
    """Returns block sizes of the selection and of the objective, the kernels' own first."""
    heads = config.index_n_heads
    rows = [rows for rows in (128, 64, 256) if rows >= heads]
    return tuple({"rows": r, "block_n": n} for n in (64, 32) for r in rows)


def _leaves(sizes: Sizes) -> dict[str, Tensor]:
    config, draw = sizes.config, sizes.draw()
    heads, dim = config.index_n_heads, config.index_head_dim
    return {
        "queries": draw(sizes.tokens, heads, dim),
        "keys": draw(sizes.entries("csa"), dim),
        "weights": draw(sizes.tokens, heads, dtype=torch.float32, scale=(heads * dim) ** -0.5),
    }


def selection_case(sizes: Sizes, k: int) -> Case:
    """Makes the selection of the k best entries of every query."""
    leaves, ranges = _leaves(sizes), sizes.ranges("csa")
    assert ranges.entry_start_T is not None and ranges.entry_end_T is not None

    def scores(x: Sequence[Tensor], rows: slice) -> Tensor:
        return naive_scores(x[0][rows], x[1], x[2][rows])

    config, visible = sizes.config, visible_entries(sizes, "csa")
    pairs = float(visible[visible > k].sum())
    moved = leaves["queries"].numel() * 2.0 + leaves["weights"].numel() * 4 + sizes.tokens * k * 4
    return Case(
        f"selection of {k} entries",
        leaves,
        lambda choice: lambda *x: select_topk(IndexerInputs(*x), ranges, k, choice),
        outputs=("selection",),
        differentiable=False,
        selection=Selection(scores, ranges.entry_start_T, ranges.entry_end_T),
        weight=layers_of(config, "csa"),
        forward=Work(2 * config.index_n_heads * config.index_head_dim * pairs, moved),
    )


def loss_case(sizes: Sizes, k: int | None) -> Case:
    """Makes the objective over all entries or k random ones, with a random target.

    Forward computes the gradients as well, backward only scales them.
    """
    leaves, ranges, draw = _leaves(sizes), sizes.ranges("csa"), sizes.draw()
    start_T, end_T = ranges.entry_start_T, ranges.entry_end_T
    assert start_T is not None and end_T is not None
    index_C = torch.arange(len(leaves["keys"]), device=sizes.device)
    mass_TC = draw(sizes.tokens, len(index_C), dtype=torch.float32).square_()
    mass_TC *= sees(index_C, start_T, end_T)
    selected_Tk = None if k is None else random_selection(draw, start_T, end_T, k)

    def mass(rows: slice, columns: slice) -> Tensor:
        if selected_Tk is None:
            return mass_TC[rows, columns]
        index = selected_Tk[rows, columns].long()
        return mass_TC[rows].gather(1, index.clamp(min=0)).masked_fill(index < 0, 0.0)

    target = KLTarget(mass, ranges, selected_Tk)
    share_T = torch.full((sizes.tokens,), 1 / sizes.tokens, device=sizes.device)

    def naive(q: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
        sees_TC = sees(index_C, start_T, end_T)
        if selected_Tk is not None:
            sees_TC = sees_TC & naive_selection_mask(selected_Tk, len(index_C))
        divergence_T = naive_query_divergences(q, keys, weights, mass_TC.to(q.dtype), sees_TC)
        return (divergence_T * share_T).sum()

    config, visible = sizes.config, visible_entries(sizes, "csa")
    pairs = float((visible if k is None else visible.clip(max=k)).sum())
    moved = leaves["queries"].numel() * 2.0 + leaves["weights"].numel() * 4 + 4 * pairs
    return Case(
        "objective over " + ("all entries" if k is None else "selected entries"),
        leaves,
        lambda choice: lambda *x: indexer_objective(IndexerInputs(*x), target, share_T, choice),
        naive=naive if sizes.dense else None,
        weight=layers_of(config, "csa"),
        forward=Work(8 * config.index_n_heads * config.index_head_dim * pairs, 3 * moved),
        backward=Work(0.0, 2.0 * sum(x.numel() * x.element_size() for x in leaves.values())),
    )
