"""The KL target of the indexer: how much attention probability each entry gets (V3.2).

T queries, n of a block; C entries, c of a block; k selected entries of a query; H heads of the core
attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.kernels.attention import AttentionInputs, AttentionRanges, entry_probability_mass
from model.kernels.operations import EAGER, Choice

MassFunction = Callable[[Any, slice], Tensor]
"""Attention probability mass, (rows, columns) -> fp32 [rows, columns]: summed over heads.

Rows are queries (a slice or an index tensor), columns entries or, with a selection, places among
the k selected ones. Zero where a query does not see an entry.
"""

MIN_PROBABILITY_MASS = torch.finfo(torch.float32).tiny
"""Smaller masses are treated as 0: denormals may be flushed, and log or division would then give
NaN or infinity."""

_RECALL_PAIRS = 1 << 20
"""(query, entry) pairs per block when computing recall."""


@dataclass(frozen=True)
class KLTarget:
    """Target of the indexer's scores: a distribution p over each query's entries.

    Attributes:
        mass: unnormalised p; p = mass / its sum over the query's entries.
            `attention_probability_mass` returns it where one process has all heads; where tensor
            ranks shard heads, `Exchange.sum_mass` makes one that communicates. It may, since
            `blocks` has the same numbers of rows in the same order on all ranks.
        ranges: the range of entries that each query sees.
        selected_Tk: the entries selected for each query (-1: none); None for all that it sees.
    """

    mass: MassFunction
    ranges: AttentionRanges
    selected_Tk: Tensor | None = None

    def blocks(self, entries: int, max_pairs: int) -> Iterator[tuple[slice, slice]]:
        """Yields (query slice, entry slice) blocks.

        The entry slice has the entries visible to any of these queries, or all k columns if entries
        are selected. A block has at most ``max_pairs`` (query, entry) pairs, but at least one
        query. The number of queries depends only on sizes: ranks with other samples take the same
        steps.
        """
        ranges, num_selected = self.ranges, None
        if self.selected_Tk is not None:
            num_selected = self.selected_Tk.shape[1]
        assert ranges.host_entry_start_T is not None and ranges.host_entry_end_T is not None
        start_T, end_T = ranges.host_entry_start_T, ranges.host_entry_end_T
        step = max(max_pairs // max(entries if num_selected is None else num_selected, 1), 1)
        for first in range(0, len(start_T) if entries else 0, step):
            rows = slice(first, min(first + step, len(start_T)))
            if num_selected is not None:
                yield rows, slice(0, num_selected)
                continue
            low = int(start_T[first])
            yield rows, slice(low, max(int(end_T[rows].max()), low))


def attention_probability_mass(
    inputs: AttentionInputs, lse2_TH: Tensor, choice: Choice = EAGER
) -> MassFunction:
    """Returns a mass function, detached, for the inputs and lse2 of `attention_with_lse2`.

    `choice` is the implementation of `entry_probability_mass`.
    """
    inputs, lse2_TH = inputs.detached(), lse2_TH.detach()

    def mass(rows: slice | Tensor, columns: slice) -> Tensor:
        queries = inputs.select(rows, columns)
        if inputs.selected_Tk is not None:
            return entry_probability_mass(queries, lse2_TH[rows], choice=choice)
        block = {"start": columns.start, "stop": columns.stop}
        return entry_probability_mass(queries, lse2_TH[rows], **block, choice=choice)

    return mass


@torch.no_grad()
def selected_probability_mass(
    mass: MassFunction,
    ranges: AttentionRanges,
    selected_Tk: Tensor | None,
    entries: int,
) -> tuple[Tensor, Tensor]:
    """Sums the mass of the selected and of all entries, each fp32 [T].

    Recall = Σ_t selected / Σ_t all. ``mass`` must have been made without a selection;
    each head's softmax denominator stays that of the attention call whose inputs it was made from.
    Without
    ``selected_Tk`` all are selected. ``entries`` is their number, C.
    """
    assert ranges.entry_start_T is not None
    all_T = torch.zeros(len(ranges.entry_start_T), device=ranges.entry_start_T.device)
    selected_T = torch.zeros_like(all_T)
    for rows, columns in KLTarget(mass, ranges).blocks(entries, _RECALL_PAIRS):
        mass_nc = mass(rows, columns)  # called even if unused: it may be a collective
        all_T[rows] = mass_nc.sum(1)
        if selected_Tk is not None and columns.start < columns.stop:
            index_nk = selected_Tk[rows].long()
            selected_nk = mass_nc.gather(1, (index_nk - columns.start).clamp(min=0))
            selected_T[rows] = selected_nk.masked_fill(index_nk < 0, 0.0).sum(1)
    return all_T.clone() if selected_Tk is None else selected_T, all_T
