"""Deduplication over all sources: exact and near duplicates, and pages made from one template.

Documents are numbered through the work items, in order, and the first of each group is kept. Near
duplicates form a graph: documents with an equal band of their signature are compared with the first
one of that band, and connected where the signatures agree in the configured share. Signatures are
memory-mapped; in memory are about 50 bytes per document, and one pass of about `_PASS` documents at
a time.

Letters: D documents of all work items, K slots of a signature.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.compiled import compiled
from data.config import FiltersConfig
from data.prepare.filters import EXACT, KEPT, NEAR, TEMPLATE
from data.prepare.signatures import NEAR_ROWS, NEAR_SLOTS, TEMPLATE_ROWS, TEMPLATE_SLOTS

Ints = NDArray[np.int64]
_PASS = 1 << 24  # documents whose keys are sorted together
_CHUNK = 1 << 14  # pairs whose signatures are compared together


class SignatureTable:
    """The signatures of all work items as one table.

    Attributes:
        items: the SIGNATURE records of each work item.
        first: number of each work item's first document, and D.
        reason [D]: KEPT, or why the document is dropped.
        original [D]: the earlier document that it repeats, -1 for none.
    """

    def __init__(self, items: Sequence[NDArray[Any]]) -> None:
        self.items = items
        self.first = np.cumsum([0] + [len(item) for item in items])
        self.reason = np.concatenate([np.asarray(item["reason"]) for item in items])
        self.original = np.full(len(self.reason), -1, dtype=np.int64)

    def rows(self, field: str, documents: Ints) -> NDArray[np.uint32]:
        """The signatures [documents, K] of some documents."""
        slots = self.items[0].dtype[field].shape[0]
        result = np.empty((len(documents), slots), dtype=np.uint32)
        item_of = np.searchsorted(self.first, documents, side="right") - 1
        for i in np.unique(item_of):
            in_item = item_of == i
            result[in_item] = self.items[i][field][documents[in_item] - self.first[i]]
        return result

    def repeats(self, field: str, columns: slice | None) -> Iterator[tuple[Ints, Ints]]:
        """Yields (documents, the first document with the same key) of those still kept, in passes.

        The key is the hash of the text, or a hash of `columns` of the signature.
        """
        passes = 1 + len(self.reason) // _PASS
        for number in range(passes):
            keys, documents = [], []
            for item, first in zip(self.items, self.first, strict=False):
                kept = np.flatnonzero(self.reason[first : first + len(item)] == KEPT)
                key = _keys(item[field], columns)[kept]
                in_pass = key % np.uint64(passes) == number
                keys.append(key[in_pass])
                documents.append(kept[in_pass] + first)
            key, document = np.concatenate(keys), np.concatenate(documents)
            order = np.argsort(key, kind="stable")
            key, document = key[order], document[order]
            begins = np.append(True, key[1:] != key[:-1])[: len(key)]
            head = document[np.maximum.accumulate(np.where(begins, np.arange(len(key)), 0))]
            yield document[~begins], head[~begins]


def find_duplicates(table: SignatureTable, filters: FiltersConfig) -> None:
    """Sets `reason` and `original` of the documents that repeat an earlier one."""
    if filters.exact_duplicates:
        for document, head in table.repeats("exact", None):
            table.reason[document], table.original[document] = EXACT, head
    if (threshold := filters.near_duplicate_similarity) is not None:
        groups = _groups(table, "near", NEAR_SLOTS, NEAR_ROWS, threshold)
        _drop_repeats(table, groups, NEAR, 2)
    if (threshold := filters.template_similarity) is not None:
        groups = _groups(table, "template", TEMPLATE_SLOTS, TEMPLATE_ROWS, threshold)
        _drop_repeats(table, groups, TEMPLATE, filters.template_min_documents)


def _groups(table: SignatureTable, field: str, slots: int, rows: int, threshold: float) -> Ints:
    """The first document [D] of each document's group."""
    parent = np.arange(len(table.reason))
    for band in range(0, slots, rows):
        for document, head in table.repeats(field, slice(band, band + rows)):
            for start in range(0, len(document), _CHUNK):
                a, b = document[start : start + _CHUNK], head[start : start + _CHUNK]
                apart = _roots(parent, a) != _roots(parent, b)
                a, b = a[apart], b[apart]
                similar = (table.rows(field, a) == table.rows(field, b)).mean(axis=1) >= threshold
                _connect(parent, a[similar], b[similar])
    return _roots(parent, np.arange(len(parent)))


def _drop_repeats(table: SignatureTable, group: Ints, reason: int, min_size: int) -> None:
    """Drops all but the first document of each group of `min_size` or more."""
    large = np.bincount(group, minlength=len(group))[group] >= min_size
    repeats = np.flatnonzero(large & (group != np.arange(len(group))))
    table.reason[repeats], table.original[repeats] = reason, group[repeats]


def _keys(values: NDArray[Any], columns: slice | None) -> NDArray[np.uint64]:
    """One 64-bit key per document: its hash, or a hash of a band of its signature."""
    if columns is None:
        return np.asarray(values)
    key = np.zeros(len(values), dtype=np.uint64)
    for column in range(columns.start, columns.stop):
        key = (key ^ values[:, column]) * np.uint64(0x9E3779B97F4A7C15)  # wraps around, as intended
        key ^= key >> np.uint64(29)
    return key


@compiled
def _roots(parent: Ints, documents: Ints) -> Ints:
    roots = np.empty_like(documents)
    for i, d in enumerate(documents):
        while parent[d] != d:
            parent[d] = parent[parent[d]]
            d = parent[d]
        roots[i] = d
    return roots


@compiled
def _connect(parent: Ints, first: Ints, second: Ints) -> None:
    """Merges the groups of pairs; the earlier root stays the root."""
    for i in range(len(first)):
        a, b = first[i], second[i]
        while parent[a] != a:
            a = parent[a]
        while parent[b] != b:
            b = parent[b]
        parent[max(a, b)] = min(a, b)
