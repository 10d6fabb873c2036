"""What each query may see, as integer ranges: all masks of attention and of the indexer.

T queries; N blocks of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Result = TypeVar("Result")


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
    _derived: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def derived(self, key: Hashable, make: Callable[[], Result]) -> Result:
        """Returns `make()`, which depends on the ranges alone, computed once for all layers."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    @property
    def int32_keys(self) -> tuple[Tensor, Tensor]:
        """int32 [T]: the first key that each query sees, and the end of those that it sees."""
        return self.derived("keys", lambda: (self.window_start_T.int(), self._own_key() + 1))

    @property
    def int32_entries(self) -> tuple[Tensor, Tensor]:
        """int32 [T]: entry_start_T and entry_end_T."""
        start_T, end_T = self.entry_start_T, self.entry_end_T
        assert start_T is not None and end_T is not None
        return self.derived("entries", lambda: (start_T.int(), end_T.int()))

    def _own_key(self) -> Tensor:
        """Returns the index of each query's own key, int32 [T]."""
        tokens, device = len(self.window_start_T), self.window_start_T.device
        key_T = torch.arange(tokens, dtype=torch.int32, device=device)
        for start, stop, shift in self.segments:
            if shift:
                key_T[start:stop] += shift
        return key_T

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
