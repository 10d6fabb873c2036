"""What each query may see, as integer ranges: all masks of attention and of the indexer.

T queries; B blocks of keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionRanges:
    """What each query may see: keys [window_start, its own], entries [entry_start, entry_end).

    Query t's own key is number t + shift of the keys, with the shift of t's segment: queries
    [start, stop) of a segment and their keys follow each other without a gap. Where keys are
    exactly the queries' own there is one segment with shift 0. ``window_start_T`` counts keys.
    ``host_*`` are the same numbers on the host; all of them never decrease with t. The entry
    ranges are None in a layer that compresses nothing.
    """

    window_start_T: Tensor
    segments: tuple[tuple[int, int, int], ...]
    entry_start_T: Tensor | None = None
    entry_end_T: Tensor | None = None
    host_entry_start_T: np.ndarray | None = None
    host_entry_end_T: np.ndarray | None = None

    def of(self, rows: slice | Tensor) -> AttentionRanges:
        """Returns what some of the queries see; without segments, so for entries alone."""
        assert self.entry_start_T is not None and self.entry_end_T is not None
        start_T, end_T = self.entry_start_T[rows], self.entry_end_T[rows]
        return AttentionRanges(self.window_start_T[rows], (), start_T, end_T)


def queries_of_blocks(
    first_B: Tensor, block: int, start_T: Tensor, end_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns, for each block of keys, queries [start, end) that see one of [first, first + block).

    Args:
        first_B: the first key of each block.
        start_T, end_T: the range of keys that each query sees; neither ever decreases.
    """
    query_start_B = torch.searchsorted(end_T, first_B, right=True, out_int32=True)
    query_end_B = torch.searchsorted(start_T, first_B + (block - 1), right=True, out_int32=True)
    return query_start_B, query_end_B
