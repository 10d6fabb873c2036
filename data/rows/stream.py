"""One source as an infinite stream of positions: epoch after epoch, each in another order.

An epoch permutes blocks of consecutive documents; with up to half a million documents a block is
one document. So any interval of the stream is found from a table of at most half a million sums,
and what it contains is a function of (seed, source, interval).

Letters: D documents (of an interval, or of the source), K blocks.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.documents import block_size
from data.errors import DataError
from data.rows.permutation import key_of, shuffled
from data.rows.shards import SourceDocuments

Ints = NDArray[np.int64]
_ORDER = 1  # purpose of a key


@dataclass(frozen=True)
class DocumentSpans:
    """The documents of an interval, in stream order.

    Attributes:
        epoch, document [D]: which document it is.
        first, end [D]: positions first … end-1 of the document lie inside the interval; `end` is
            the document's number of positions where its end lies inside.
        positions [D]: the document's number of positions.
    """

    epoch: Ints
    document: Ints
    first: Ints
    end: Ints
    positions: Ints


class SourceStream:
    """The documents of a source in one split, over all its shards.

    Arguments:
        name: of the source.
        source: its documents; they are numbered through its shards, in the manifest's order.
        seed: decides the order.

    Attributes:
        domain: of the source.
        documents: their number.
        positions: positions in one epoch; a document of n tokens has n-1, an empty one none.

    Raises DataError where no document has a position.
    """

    def __init__(self, name: str, source: SourceDocuments, seed: int) -> None:
        self.name, self.domain, self.source = name, source.domain, source
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        self.key = key_of(seed, int.from_bytes(digest, "big"))
        self.documents = source.count
        if not self.documents or source.table.longest < 2:
            raise DataError(
                f"the shards of source {name!r} hold no document of two tokens or more, and only "
                "such have something to predict."
            )
        self._block = np.arange(0, self.documents, block_size(self.documents))
        self._block_end = np.append(self._block[1:], self.documents)
        self._positions = source.table.positions
        self.positions = int(self._positions.sum())
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """([K] blocks in the order of an epoch, [K] the position at which each ends)."""
        order = shuffled(len(self._block), key_of(self.key, _ORDER, epoch))
        return order, np.cumsum(self._positions[order])

    def tokens_of(self, document: int, start: int = 0, end: int | None = None) -> NDArray[Any]:
        """The ids of a document as the shard stores them, bos and eos included.

        Or those from `start` until before `end`: of a long document, a row needs a part.
        """
        return self.source.read(document, start, end)

    def lengths_of(self, documents: Ints) -> Ints:
        """Tokens of each of the documents."""
        return self.source.table.lengths.take(documents)

    def between(self, begin: int, end: int) -> DocumentSpans:
        """The documents that have positions in [begin, end) of the stream."""
        if end <= begin:
            empty = np.zeros(0, dtype=np.int64)
            return DocumentSpans(empty, empty, empty, empty, empty)
        total = self.positions
        spans = [
            self._within(epoch, max(begin - epoch * total, 0), min(end - epoch * total, total))
            for epoch in range(begin // total, (end - 1) // total + 1)
        ]
        return DocumentSpans(*(np.concatenate(column) for column in zip(*spans, strict=True)))

    def _within(self, epoch: int, begin: int, end: int) -> tuple[Ints, ...]:
        order, ends = self._epoch(epoch)
        low = int(np.searchsorted(ends, begin, side="right"))
        blocks = order[low : int(np.searchsorted(ends, end, side="left")) + 1]
        counts = self._block_end[blocks] - self._block[blocks]
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        document = np.repeat(self._block[blocks], counts) + inside
        length = np.maximum(self.lengths_of(document) - 1, 0)
        stop = np.cumsum(length) + (ends[low] - self._positions[order[low]])
        start = stop - length
        overlaps = (np.minimum(stop, end) > np.maximum(start, begin)).nonzero()[0]
        document, length, start = document[overlaps], length[overlaps], start[overlaps]
        first = np.maximum(begin - start, 0)
        last = np.minimum(end - start, length)
        return np.full(len(overlaps), epoch), document, first, last, length

    def snap(self, position: int, seq_len: int, slack: int) -> int:
        """The start of the piece that contains `position`, or `position` if that is over `slack`
        positions earlier.
        """
        if position % self.positions == 0:
            return position
        epoch, inside = divmod(position, self.positions)
        _, _, first, *_ = self._within(epoch, inside, inside + 1)
        back = int(first[0]) % seq_len
        return position - back if back <= slack else position
