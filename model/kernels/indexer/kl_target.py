"""The KL target of the indexer: how much attention probability each entry gets (report §2.3.1).

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

AttentionProbabilityMass = Callable[[Any, slice], Tensor]
"""mass(rows, columns): fp32 attention probability summed over all heads, [rows, columns] of queries
(a slice or their numbers) and of entries, or of places in their lists where the entries are
selected. Zero where a query does not see an entry."""

MIN_PROBABILITY_MASS = torch.finfo(torch.float32).tiny
"""Less counts as none: a logarithm or a quotient of it would not be a number on every device."""

_RECALL_PAIRS = 1 << 20
"""Pairs of a query and an entry handled at once where a selection is measured."""


@dataclass(frozen=True)
class KLTarget:
    """What the indexer's scores are compared with: a distribution p over each query's entries.

    Attributes:
        mass: divided by its sum over a query's entries it is p. `attention_probability_mass` makes
            it where one process has all queries and heads. Ranks with as many queries and entries
            ask for the same number of rows in the same order, so that a mass may be a sum over
            ranks.
        ranges: the range of entries that each query sees.
        selected_Tk: the entries of each query (-1: none); without it all that the query sees.
    """

    mass: AttentionProbabilityMass
    ranges: AttentionRanges
    selected_Tk: Tensor | None = None

    def blocks(self, entries: int, max_pairs: int) -> Iterator[tuple[slice, slice]]:
        """Yields queries, and the entries that one of them sees or the places in their lists.

        A block has at most ``max_pairs`` pairs, or one query. How many queries it has depends on
        sizes alone: ranks with other samples take the same steps.
        """
        ranges, places = self.ranges, None
        if self.selected_Tk is not None:
            places = self.selected_Tk.shape[1]
        assert ranges.host_entry_start_T is not None and ranges.host_entry_end_T is not None
        start_T, end_T = ranges.host_entry_start_T, ranges.host_entry_end_T
        step = max(max_pairs // max(entries if places is None else places, 1), 1)
        for first in range(0, len(start_T) if entries else 0, step):
            rows = slice(first, min(first + step, len(start_T)))
            if places is not None:
                yield rows, slice(0, places)
                continue
            low = int(start_T[first])
            yield rows, slice(low, max(int(end_T[rows].max()), low))


def attention_probability_mass(
    inputs: AttentionInputs, lse2_TH: Tensor
) -> AttentionProbabilityMass:
    """Returns the mass from what `attention_with_lse2` had and returned, without a gradient."""
    inputs, lse2_TH = inputs.detached(), lse2_TH.detach()

    def mass(rows: slice | Tensor, columns: slice) -> Tensor:
        queries = inputs.select(rows, columns)
        if inputs.selected_Tk is not None:
            return entry_probability_mass(queries, lse2_TH[rows])
        block = {"start": columns.start, "stop": columns.stop}
        return entry_probability_mass(queries, lse2_TH[rows], **block)

    return mass


@torch.no_grad()
def selected_probability_mass(
    mass: AttentionProbabilityMass,
    ranges: AttentionRanges,
    selected_Tk: Tensor | None,
    entries: int,
) -> tuple[Tensor, Tensor]:
    """Sums the mass of the selected and of all entries, each fp32 [T].

    Their quotient, of sums over queries, is the recall of the selection. ``mass`` is that of all
    entries, not of a list; its heads' denominators are those of the attention that it came from.
    Without ``selected_Tk`` all are selected. ``entries`` is their number, C.
    """
    assert ranges.entry_start_T is not None
    all_T = torch.zeros(len(ranges.entry_start_T), device=ranges.entry_start_T.device)
    selected_T = torch.zeros_like(all_T)
    for rows, columns in KLTarget(mass, ranges).blocks(entries, _RECALL_PAIRS):
        mass_nc = mass(rows, columns)  # asked for in any case: it may be a sum over ranks
        all_T[rows] = mass_nc.sum(1)
        if selected_Tk is not None and columns.start < columns.stop:
            index_nk = selected_Tk[rows].long()
            selected_nk = mass_nc.gather(1, (index_nk - columns.start).clamp(min=0))
            selected_T[rows] = selected_nk.masked_fill(index_nk < 0, 0.0).sum(1)
    return all_T.clone() if selected_Tk is None else selected_T, all_T
