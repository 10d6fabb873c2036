"""Best-fit packing of documents into rows (Ding et al. 2024; report §4.1).

A document longer than a row is cut into pieces of `seq_len` and a remainder; the pieces are then
placed, longest first, each into the row with the smallest sufficient room. `pack` cuts only
documents longer than a row; `pack_into`, which training uses, also cuts pieces that do not fit into
its number of rows. Concatenate-and-cut cuts one at the end of every row.

Letters: P pieces, R rows.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.compiled import compiled

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PackedRows:
    """Rows of pieces, flattened row by row.

    Attributes:
        offsets [R+1]: row r has the pieces offsets[r] … offsets[r+1]-1.
        document, start, length [P]: the piece is positions start … start+length-1 of a document.
    """

    offsets: Ints
    document: Ints
    start: Ints
    length: Ints

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> list[tuple[int, int, int]]:
        """(document, start, length) of each piece of row `index`, in order."""
        pieces = slice(self.offsets[index], self.offsets[index + 1])
        columns = (self.document[pieces], self.start[pieces], self.length[pieces])
        return list(zip(*(column.tolist() for column in columns), strict=True))


def pack(lengths: Ints, seq_len: int, order: Ints | None = None) -> PackedRows:
    """Packs documents of the given lengths (in positions) into rows of `seq_len`.

    `order` lists the documents to pack, all of them by default, and breaks ties between pieces of
    equal length. Documents of length 0 take no room. The result is a function of the arguments
    alone.
    """
    order = np.arange(len(lengths)) if order is None else order
    end = lengths[order].astype(np.int64)
    owner, start, length = pieces_of(np.zeros_like(end), end, seq_len)
    # Stable, so that equal lengths keep `order`; a radix sort on 32-bit keys.
    longest_first = np.argsort((seq_len - length).astype(np.int32), kind="stable")
    row_of, rows = _best_fit(length[longest_first], seq_len)
    document = order[owner[longest_first]]
    return _by_row(document, start[longest_first], length[longest_first], row_of, rows)


def pack_windows(lengths: Ints, seq_len: int, order: Ints, window: int) -> PackedRows:
    """Packs `window` documents of `order` at a time; the rows of the windows follow each other."""
    parts = [
        pack(lengths, seq_len, order[first : first + window])
        for first in range(0, len(order), window)
    ]
    starts = np.cumsum([0] + [len(part.document) for part in parts])
    offsets = [part.offsets[1:] + base for part, base in zip(parts, starts, strict=False)]
    return PackedRows(
        np.concatenate([np.zeros(1, dtype=np.int64), *offsets]),
        np.concatenate([part.document for part in parts]),
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.length for part in parts]),
    )


@compiled
def _best_fit(lengths: Ints, seq_len: int) -> tuple[Ints, int]:
    """(row of each piece [P], number of rows).

    Rows with the same room left form a stack; the most recently filled one is taken first. A binary
    tree over the amounts of room, with node k the parent of 2k and 2k+1, marks the stacks that are
    not empty, so that the smallest sufficient room is found in log2(seq_len) steps.
    """
    leaves = 1
    while leaves < seq_len + 1:
        leaves *= 2
    filled = np.zeros(2 * leaves, dtype=np.bool_)
    top = np.full(seq_len + 1, -1, dtype=np.int64)
    below = np.empty(len(lengths), dtype=np.int64)
    row_of = np.empty(len(lengths), dtype=np.int64)
    rows = 0
    for i in range(len(lengths)):
        node = leaves + lengths[i]
        if not filled[node]:
            # Climb until a right-hand sibling is marked, then descend to its leftmost marked leaf.
            while node > 1 and (node % 2 == 1 or not filled[node + 1]):
                node //= 2
            if node > 1:
                node += 1
                while node < leaves:
                    node = 2 * node if filled[2 * node] else 2 * node + 1
        if node > 1:
            room = node - leaves
            row = top[room]
            top[room] = below[row]
            if top[room] < 0:
                filled[node] = False
                while node > 1:
                    node //= 2
                    filled[node] = filled[2 * node] or filled[2 * node + 1]
        else:
            room, row = seq_len, rows
            rows += 1
        row_of[i] = row
        left = room - lengths[i]
        if left > 0:
            below[row] = top[left]
            top[left] = row
            node = leaves + left
            while node >= 1 and not filled[node]:
                filled[node] = True
                node //= 2
    return row_of, rows


def pieces_of(first: Ints, end: Ints, seq_len: int) -> tuple[Ints, Ints, Ints]:
    """(document, start, length), [P] each, of the pieces of positions first … end-1 of documents.

    Cuts are at multiples of `seq_len` from the document's beginning, whatever `first` is.
    """
    cell = first // seq_len
    counts = -(-end // seq_len) - cell
    document = np.repeat(np.arange(len(first)), counts)
    inside = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = (cell[document] + inside) * seq_len
    start = np.maximum(begin, first[document])
    return document, start, np.minimum(begin + seq_len, end[document]) - start


def pack_into(document: Ints, start: Ints, length: Ints, seq_len: int, rows: int) -> PackedRows:
    """Packs pieces by best fit into exactly `rows` rows, some of which may stay empty.

    Where best fit needs more rows, the pieces of its emptiest rows are cut to fill the room left in
    the others. The pieces' lengths must sum to at most rows * seq_len.
    """
    longest_first = np.argsort((seq_len - length).astype(np.int32), kind="stable")
    row_of, used = _best_fit(length[longest_first], seq_len)
    document, start, length = document[longest_first], start[longest_first], length[longest_first]
    if used > rows:
        filled = np.bincount(row_of, weights=length, minlength=used).astype(np.int64)
        fullest = np.argsort(-filled, kind="stable")
        rank = np.empty(used, dtype=np.int64)
        rank[fullest] = np.arange(used)
        row_of = rank[row_of]
        room = seq_len - filled[fullest[:rows]]
        piece, start, length, row_of = _squeeze(start, length, row_of, room)
        document = document[piece]
    return _by_row(document, start, length, row_of, rows)


def concatenate(document: Ints, start: Ints, length: Ints, seq_len: int, rows: int) -> PackedRows:
    """Packs pieces one after another, cut at the end of every row."""
    end = np.cumsum(length)
    begin = end - length
    counts = (end - 1) // seq_len - begin // seq_len + 1
    piece = np.repeat(np.arange(len(length)), counts)
    inside = np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts, counts)
    row_of = begin[piece] // seq_len + inside
    low = np.maximum(row_of * seq_len, begin[piece])
    high = np.minimum((row_of + 1) * seq_len, end[piece])
    return _by_row(document[piece], start[piece] + low - begin[piece], high - low, row_of, rows)


def _by_row(document: Ints, start: Ints, length: Ints, row_of: Ints, rows: int) -> PackedRows:
    order = np.argsort(row_of, kind="stable")
    offsets = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=rows), out=offsets[1:])
    return PackedRows(offsets, document[order], start[order], length[order])


@compiled
def _squeeze(start: Ints, length: Ints, row_of: Ints, room: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Moves the pieces of rows ≥ len(room), cut where needed, into the rows with most room first.

    Returns (index of the original piece, start, length, row) of the resulting pieces.
    """
    most_first = np.argsort(-room, kind="mergesort")
    size = len(length) + len(room)
    piece, begin = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    long, row = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    count, place = 0, 0
    for i in range(len(length)):
        done = 0
        while done < length[i]:
            target = row_of[i]
            taken = length[i] - done
            if target >= len(room):
                target = most_first[place]
                taken = min(taken, room[target])
                room[target] -= taken
                if room[target] == 0:
                    place += 1
            if taken > 0:
                piece[count], begin[count] = i, start[i] + done
                long[count], row[count] = taken, target
                count += 1
            done += taken
    return piece[:count], begin[:count], long[:count], row[:count]
