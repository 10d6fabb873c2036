"""What each query may see, as integer ranges: all masks of attention and of the indexer.

T queries; N blocks of keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionRanges:
    """What each query may see: keys window_start to its own (inclusive), and a range of entries.

    Attributes:
        window_start_T: index of the first key that each query sees.
        segments: (start, stop, shift): query t in [start, stop) has its own key at index t + shift.
            Queries of a segment, and their keys, are contiguous. If the keys are exactly those of
            the queries there is one segment with shift 0.
        entry_start_T, entry_end_T: entries [entry_start, entry_end); None in a layer without
            compression.
        host_entry_start_T, host_entry_end_T: the same numbers on the host.

    None of the bounds decreases with t.
    """

    window_start_T: Tensor
    segments: tuple[tuple[int, int, int], ...]
    entry_start_T: Tensor | None = None
    entry_end_T: Tensor | None = None
    host_entry_start_T: np.ndarray | None = None
    host_entry_end_T: np.ndarray | None = None

    def select(self, rows: slice | Tensor) -> AttentionRanges:
        """Restricts to some queries; the result has no segments and is valid for entries only."""
        assert self.entry_start_T is not None and self.entry_end_T is not None
        start_T, end_T = self.entry_start_T[rows], self.entry_end_T[rows]
        return AttentionRanges(self.window_start_T[rows], (), start_T, end_T)


def queries_of_blocks(
    first_N: Tensor, block: int, start_T: Tensor, end_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns, for each block of keys, queries [start, end) that see any of its keys.

    A block has keys [first, first + block).

    Args:
        first_N: the first key of each block.
        start_T, end_T: the range of keys that each query sees; neither decreases with t.
    """
    query_start_N = torch.searchsorted(end_T, first_N, right=True, out_int32=True)
    query_end_N = torch.searchsorted(start_T, first_N + (block - 1), right=True, out_int32=True)
    return query_start_N, query_end_N
