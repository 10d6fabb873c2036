"""One source as an endless line of positions: epoch after epoch, each in an order of its own.

Documents keep together in blocks of neighbours (of one document each up to half a million
documents), and an epoch permutes the blocks. So any interval of the line is found from a table of
at most half a million sums, and what it holds is a function of (seed, source, interval).
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.rows.permutation import key_of, shuffled

Ints = NDArray[np.int64]
_MAX_BLOCKS = 1 << 19
_ORDER = 1  # what a key is for


@dataclass(frozen=True)
class Documents:
    """Documents of an interval, in its order; positions `first` … `last`-1 lie inside it.

    Each field is [D]. `last` is the whole length in positions where the document's end is inside.
    """

    epoch: Ints
    document: Ints
    first: Ints
    last: Ints


class SourceStream:
    """The documents of a source in one split, over all their parts.

    Arguments:
        name, domain: of the source.
        parts: opened shards, in their order; documents are numbered through them.
        seed: decides the order.
    """

    def __init__(self, name: str, domain: str, parts: list[Any], seed: int) -> None:
        self.name, self.domain, self.parts = name, domain, parts
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        self.key = key_of(seed, int.from_bytes(digest, "big"))
        lengths = [part.sequence_lengths for part in parts]
        self.lengths = lengths[0] if len(lengths) == 1 else np.concatenate(lengths)
        self.first_of_part = np.cumsum([0] + [len(part) for part in lengths])
        self.documents = len(self.lengths)
        size = -(-self.documents // _MAX_BLOCKS)
        self._block = np.arange(0, self.documents, size)
        self._block_end = np.append(self._block[1:], self.documents)
        totals = np.add.reduceat(self.lengths, self._block, dtype=np.int64)
        self._positions = totals - (self._block_end - self._block)
        self.positions = int(self._positions.sum())
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """Blocks in the order of an epoch, and the end of each on the epoch's line."""
        order = shuffled(len(self._block), key_of(self.key, _ORDER, epoch))
        return order, np.cumsum(self._positions[order])

    def between(self, begin: int, end: int) -> Documents:
        """The documents that have positions in [begin, end) of the endless line."""
        if end <= begin:
            nothing = np.zeros(0, dtype=np.int64)
            return Documents(nothing, nothing, nothing, nothing)
        total = self.positions
        parts = [
            self._within(epoch, max(begin - epoch * total, 0), min(end - epoch * total, total))
            for epoch in range(begin // total, (end - 1) // total + 1)
        ]
        return Documents(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _within(self, epoch: int, begin: int, end: int) -> tuple[Ints, Ints, Ints, Ints]:
        order, ends = self._epoch(epoch)
        low = int(np.searchsorted(ends, begin, side="right"))
        blocks = order[low : int(np.searchsorted(ends, end, side="left")) + 1]
        counts = self._block_end[blocks] - self._block[blocks]
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        document = np.repeat(self._block[blocks], counts) + inside
        length = self.lengths[document].astype(np.int64) - 1
        stop = np.cumsum(length) + (ends[low] - self._positions[order[low]])
        start = stop - length
        kept = (np.minimum(stop, end) > np.maximum(start, begin)).nonzero()[0]
        document, length, start = document[kept], length[kept], start[kept]
        first = np.maximum(begin - start, 0)
        return np.full(len(kept), epoch), document, first, np.minimum(end - start, length)

    def snapped(self, place: int, seq_len: int, slack: int) -> int:
        """`place`, or the beginning of the piece it lies in, if that is at most `slack` before."""
        if place % self.positions == 0:
            return place
        epoch, inside = divmod(place, self.positions)
        found = self._within(epoch, inside, inside + 1)
        back = int(found[2][0]) % seq_len
        return place - back if back <= slack else place
