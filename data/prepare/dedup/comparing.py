"""The comparison of candidate pairs by their whole signatures, without random reads.

The signature of each pair's first document is sent to the range of the second, which is read once.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.prepare.dedup.kernels import Ints, equal_slots, stars
from data.prepare.dedup.plan import SLOTS, DedupTask, Field, SignatureFiles, pairs, read_pairs
from data.prepare.dedup.scatter import Output, ScatterWriter, read_part
from data.prepare.task import Preparation

_NUMBER = 2  # 32-bit words of a document's number in front of its signature


class HeadsTask(DedupTask):
    """Writes the signatures of a range's documents that other ranges compare with, by these ranges.

    A row is the document's number in two words and its signature.
    """

    kind: Literal["dedup-heads"] = "dedup-heads"
    field: Field
    matches: Output

    def write(self, preparation: Preparation) -> None:
        """Reads the signatures of the range once for each `_requests`."""
        plan = self.plan
        with ScatterWriter(self.output(preparation.folder), plan.ranges, plan.memory) as writer:
            for requests in self._requests(preparation):
                first, of_range = requests // plan.ranges, requests % plan.ranges
                for begin, end, records in SignatureFiles(preparation).selected(first):
                    rows = first[begin:end] - first[begin]
                    number = first[begin:end, None].view(np.uint32)
                    values = records[self.field][rows]
                    writer.add(of_range[begin:end], np.concatenate([number, values], axis=1))

    def _requests(self, preparation: Preparation) -> Iterator[Ints]:
        """Yields document * R + range, sorted and distinct, of as many rows as memory allows."""
        chunks: list[Ints] = []
        for rows in read_part(
            preparation.folder, [self.matches], self.plan.ranges + self.number, 2
        ):
            chunks.append(np.unique(rows[:, 0] * self.plan.ranges + rows[:, 1]))
            if sum(chunk.nbytes for chunk in chunks) > self.plan.memory // 16:
                chunks = [np.unique(np.concatenate(chunks))]
                if chunks[0].nbytes > self.plan.memory // 32:
                    yield chunks.pop()
        if chunks:
            yield np.unique(np.concatenate(chunks))


class CompareTask(DedupTask):
    """Writes an edge from each document of a range to the first one of its group in the range.

    Groups are the pairs whose signatures agree in at least `threshold` of their values. An edge
    (document, first) is in the part of the document's range, and in R + that of the other one.
    """

    kind: Literal["dedup-compare"] = "dedup-compare"
    field: Field
    threshold: float
    matches: Output
    heads: Output

    def write(self, preparation: Preparation) -> None:
        """Reads the signatures of the range once for each `_signatures`."""
        plan = self.plan
        start, _ = plan.bounds(self.number)
        rows = read_pairs(preparation.folder, [self.matches], self.number)
        codes = np.unique(rows[:, 1] * plan.range_size + (rows[:, 0] - start))
        del rows
        first, documents = codes // plan.range_size, codes % plan.range_size + start
        edges = [np.empty((0, 2), dtype=np.int64)]
        for numbers, signatures in self._signatures(preparation):
            place = np.searchsorted(numbers, first).clip(max=len(numbers) - 1)
            there = np.flatnonzero(numbers[place] == first)
            there = there[np.argsort(documents[there], kind="stable")]
            place, document = place[there], documents[there]
            for begin, end, records in SignatureFiles(preparation).selected(document):
                of_block = document[begin:end] - document[begin]
                values = np.ascontiguousarray(records[self.field])
                equal = equal_slots(values, signatures, of_block, place[begin:end])
                similar = equal / SLOTS[self.field] >= self.threshold
                edges.append(pairs(document[begin:end], first[there[begin:end]])[similar])
        with ScatterWriter(self.output(preparation.folder), 2 * plan.ranges, plan.memory) as writer:
            add_edges(writer, self, stars(np.concatenate(edges)))

    def _signatures(self, preparation: Preparation) -> Iterator[tuple[Ints, NDArray[Any]]]:
        """Yields (documents, signatures), sorted, of as many as a quarter of the memory holds."""
        chunks: list[NDArray[Any]] = []
        width = _NUMBER + SLOTS[self.field]
        for rows in read_part(preparation.folder, [self.heads], self.number, width, np.uint32):
            step = max(1, self.plan.memory // 8 // rows[:1].nbytes)
            for start in range(0, len(rows), step):
                chunks.append(rows[start : start + step])
                if sum(chunk.nbytes for chunk in chunks) >= self.plan.memory // 8:
                    yield _by_number(chunks)
        if chunks:
            yield _by_number(chunks)


def _by_number(chunks: list[NDArray[Any]]) -> tuple[Ints, NDArray[Any]]:
    """(documents, signatures) of rows, sorted; empties `chunks`."""
    rows = np.concatenate(chunks)
    chunks.clear()
    numbers = rows[:, :_NUMBER].copy().view(np.int64)[:, 0]
    order = np.argsort(numbers, kind="stable")
    return numbers[order], np.take(rows[:, _NUMBER:], order, axis=0)


def add_edges(writer: ScatterWriter, task: DedupTask, edges: Ints) -> None:
    """Adds edges (document, earlier one) to the part of the one and to R + that of the other."""
    writer.add(task.plan.range_of(edges[:, 0]), edges)
    writer.add(task.plan.ranges + task.plan.range_of(edges[:, 1]), edges)
