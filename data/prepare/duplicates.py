"""Which of all sources' documents repeat an earlier one: exact, near, and batches from a template.

Documents are numbered through the units, in order, and the first of a kind stays. Nearness is a
graph: documents with an equal band of their signature are compared with the first of that band, and
joined where the signatures agree in the configured share. What is read is mapped from the units'
files; in memory are some 50 bytes a document and one pass of about `_PASS` documents at a time.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from data.config import FiltersConfig
from data.prepare.filters import EXACT, KEPT, NEAR, TEMPLATE
from data.prepare.signatures import NEAR_ROWS, NEAR_SLOTS, TEMPLATE_ROWS, TEMPLATE_SLOTS

Ints = NDArray[np.int64]
_PASS = 1 << 24  # documents whose keys are sorted at a time
_CHUNK = 1 << 14  # pairs whose signatures are compared at a time


class Signed:
    """The signatures of all units as one table, with `reason` [D] and `like` [D] in memory.

    `like` is the document that one left out repeats, -1 for none.
    """

    def __init__(self, units: Sequence[NDArray[Any]]) -> None:
        self.units = units
        self.first = np.cumsum([0] + [len(unit) for unit in units])
        self.reason = np.concatenate([np.asarray(unit["reason"]) for unit in units])
        self.like = np.full(len(self.reason), -1, dtype=np.int64)

    def rows(self, field: str, documents: Ints) -> NDArray[np.uint32]:
        """The signatures of some documents."""
        found = np.empty((len(documents), self.units[0].dtype[field].shape[0]), dtype=np.uint32)
        unit = np.searchsorted(self.first, documents, side="right") - 1
        for u in np.unique(unit):
            here = unit == u
            found[here] = self.units[u][field][documents[here] - self.first[u]]
        return found

    def repeats(self, field: str, columns: slice | None) -> Iterator[tuple[Ints, Ints]]:
        """(documents, the first document with the same key) of those still kept, in passes."""
        passes = 1 + len(self.reason) // _PASS
        for number in range(passes):
            keys, documents = [], []
            for unit, first in zip(self.units, self.first, strict=False):
                kept = np.flatnonzero(self.reason[first : first + len(unit)] == KEPT)
                key = _keys(unit[field], columns)[kept]
                mine = key % np.uint64(passes) == number
                keys.append(key[mine])
                documents.append(kept[mine] + first)
            key, document = np.concatenate(keys), np.concatenate(documents)
            order = np.argsort(key, kind="stable")
            key, document = key[order], document[order]
            begins = np.append(True, key[1:] != key[:-1])[: len(key)]
            head = document[np.maximum.accumulate(np.where(begins, np.arange(len(key)), 0))]
            yield document[~begins], head[~begins]


def find_duplicates(signed: Signed, filters: FiltersConfig) -> None:
    """Set `reason` and `like` of the documents that repeat an earlier one."""
    if filters.exact_duplicates:
        for document, head in signed.repeats("exact", None):
            signed.reason[document], signed.like[document] = EXACT, head
    if filters.near_duplicate_similarity is not None:
        parent = _joined(signed, "near", NEAR_SLOTS, NEAR_ROWS, filters.near_duplicate_similarity)
        _leave_out(signed, parent, NEAR, 2)
    if filters.template_similarity is not None:
        parent = _joined(
            signed, "template", TEMPLATE_SLOTS, TEMPLATE_ROWS, filters.template_similarity
        )
        _leave_out(signed, parent, TEMPLATE, filters.template_min_documents)


def _joined(signed: Signed, field: str, slots: int, rows: int, least: float) -> Ints:
    """[D]: the first document of each document's group."""
    parent = np.arange(len(signed.reason))
    for band in range(0, slots, rows):
        for document, head in signed.repeats(field, slice(band, band + rows)):
            for start in range(0, len(document), _CHUNK):
                a, b = document[start : start + _CHUNK], head[start : start + _CHUNK]
                apart = _roots(parent, a) != _roots(parent, b)
                a, b = a[apart], b[apart]
                alike = (signed.rows(field, a) == signed.rows(field, b)).mean(axis=1) >= least
                _join(parent, a[alike], b[alike])
    return _roots(parent, np.arange(len(parent)))


def _leave_out(signed: Signed, group: Ints, reason: int, least: int) -> None:
    """Of groups of `least` documents or more, keep the first."""
    large = np.bincount(group, minlength=len(group))[group] >= least
    gone = np.flatnonzero(large & (group != np.arange(len(group))))
    signed.reason[gone], signed.like[gone] = reason, group[gone]


def _keys(values: NDArray[Any], columns: slice | None) -> NDArray[np.uint64]:
    """One 64-bit key a document: its hash, or a hash of a band of its signature."""
    if columns is None:
        return np.asarray(values)
    key = np.zeros(len(values), dtype=np.uint64)
    for column in range(columns.start, columns.stop):
        key = (key ^ values[:, column]) * np.uint64(0x9E3779B97F4A7C15)  # wraps around, as meant
        key ^= key >> np.uint64(29)
    return key


@numba.njit(cache=True, nogil=True)
def _roots(parent: Ints, documents: Ints) -> Ints:
    found = np.empty_like(documents)
    for i, d in enumerate(documents):
        while parent[d] != d:
            parent[d] = parent[parent[d]]
            d = parent[d]
        found[i] = d
    return found


@numba.njit(cache=True, nogil=True)
def _join(parent: Ints, first: Ints, second: Ints) -> None:
    """Join the groups of pairs; the earlier root stays the root."""
    for i in range(len(first)):
        a, b = first[i], second[i]
        while parent[a] != a:
            a = parent[a]
        while parent[b] != b:
            b = parent[b]
        parent[max(a, b)] = min(a, b)
