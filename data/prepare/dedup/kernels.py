"""The loops of deduplication: keys of bands, the first document of each key, connected groups.

Letters: N documents, B bands of a signature, E edges.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.compiled import compiled

Ints = NDArray[np.int64]
_CHUNK = 1 << 14


@compiled
def band_keys(values: NDArray[np.uint32], rows: int) -> NDArray[np.uint64]:
    """The keys [N, B] of signatures [N, B * rows]: a hash of each band of `rows` values."""
    bands = values.shape[1] // rows
    keys = np.empty((len(values), bands), dtype=np.uint64)
    for i in range(len(values)):
        for band in range(bands):
            key = np.uint64(0)
            for column in range(band * rows, (band + 1) * rows):
                key = (key ^ np.uint64(values[i, column])) * np.uint64(0x9E3779B97F4A7C15)
                key ^= key >> np.uint64(29)
            keys[i, band] = key
    return keys


class FirstDocuments:
    """The first document of each key, of documents that are added in order.

    A hash table with linear probing, at most half full: 64 bytes for each different key, and half
    as many again while it grows.

    Arguments:
        expected: number of different keys.
    """

    def __init__(self, expected: int) -> None:
        self.count = 0
        self._allocate(1 << (2 * (expected + _CHUNK)).bit_length())

    def _allocate(self, slots: int) -> None:
        self.keys = np.empty(slots, dtype=np.int64)
        self.documents = np.full(slots, -1, dtype=np.int64)

    def repeats(self, rows: Ints) -> tuple[Ints, Ints]:
        """Adds rows [N, 2] of (key, document).

        Returns (documents, the first document with the same key) of those that have an earlier one.
        """
        results = []
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            if 2 * (self.count + len(chunk)) > len(self.keys):
                keys, documents = self.keys, self.documents
                self._allocate(2 * len(keys))
                _copy(keys, documents, self.keys, self.documents)
            results.append(_match(chunk, self.keys, self.documents))
            self.count += len(chunk) - len(results[-1])
        pairs = np.concatenate(results) if results else np.empty((0, 2), dtype=np.int64)
        return pairs[:, 0], pairs[:, 1]


@compiled
def _slot(key: Any, keys: Ints, documents: Ints) -> Any:
    """The slot of a key, or the free one where it belongs."""
    mask = len(keys) - 1
    slot = np.int64((np.uint64(key) * np.uint64(0xD6E8FEB86659FD93)) >> np.uint64(20)) & mask
    while documents[slot] >= 0 and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot


@compiled
def _copy(keys: Ints, documents: Ints, new_keys: Ints, new_documents: Ints) -> None:
    for i in range(len(keys)):
        if documents[i] >= 0:
            slot = _slot(keys[i], new_keys, new_documents)
            new_keys[slot], new_documents[slot] = keys[i], documents[i]


@compiled
def _match(rows: Ints, keys: Ints, documents: Ints) -> Ints:
    pairs = np.empty((len(rows), 2), dtype=np.int64)
    count = 0
    for i in range(len(rows)):
        slot = _slot(rows[i, 0], keys, documents)
        if documents[slot] < 0:
            keys[slot], documents[slot] = rows[i, 0], rows[i, 1]
        else:
            pairs[count, 0], pairs[count, 1] = rows[i, 1], documents[slot]
            count += 1
    return pairs[:count].copy()


@compiled
def place_rows(rows: Any, parts: NDArray[np.int32], place: Ints, output: Any) -> None:
    """Copies rows [N, W] to where the next row of their part belongs, and advances `place`."""
    for i in range(len(rows)):
        output[place[parts[i]]] = rows[i]
        place[parts[i]] += 1


@compiled
def equal_slots(
    first: NDArray[np.uint32], second: NDArray[np.uint32], of_first: Ints, of_second: Ints
) -> Ints:
    """The number [E] of equal values of first[of_first[e]] and second[of_second[e]]."""
    counts = np.zeros(len(of_first), dtype=np.int64)
    for e in range(len(of_first)):
        a, b = of_first[e], of_second[e]
        count = 0
        for k in range(first.shape[1]):
            count += first[a, k] == second[b, k]
        counts[e] = count
    return counts


def stars(edges: Ints) -> Ints:
    """The edges [E, 2] of the same groups, from each document to the first one of its group.

    Sorted by document, which is there once. In memory are about 100 bytes for each edge given.
    """
    documents = np.unique(edges)
    parent = np.arange(len(documents))
    for start in range(0, len(edges), 1 << 16):
        _connect(parent, np.searchsorted(documents, edges[start : start + (1 << 16)]))
    root = _roots(parent)
    repeats = np.flatnonzero(root != np.arange(len(root)))
    return np.stack([documents[repeats], documents[root[repeats]]], axis=1)


@compiled
def _root(parent: Ints, node: Any) -> Any:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


@compiled
def _connect(parent: Ints, edges: Ints) -> None:
    """Merges the groups of both ends of each edge; the earlier root stays the root."""
    for e in range(len(edges)):
        a, b = _root(parent, edges[e, 0]), _root(parent, edges[e, 1])
        parent[max(a, b)] = min(a, b)


@compiled
def _roots(parent: Ints) -> Ints:
    roots = np.empty_like(parent)
    for node in range(len(parent)):
        roots[node] = _root(parent, node)
    return roots
