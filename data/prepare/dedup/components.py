"""The groups of connected documents: rows (document, first document of its group).

Where all edges fit in memory, one task finds them by union-find. Otherwise rounds of two stages
over ranges do (Kiveris et al. 2014, "Connected components in MapReduce and beyond"): a large star
connects the later neighbours of a document with its earliest one, a small star the earlier ones. A
round that changes nothing leaves stars, with the first document of each group in the middle.

Edges (document, earlier one) are in the parts of `add_edges`. A task holds one number for each
document of its range, however many edges it reads.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from data.prepare.dedup.comparing import add_edges
from data.prepare.dedup.kernels import Ints, stars
from data.prepare.dedup.plan import DedupTask, pairs
from data.prepare.dedup.scatter import Output, ScatterWriter, read_part
from data.prepare.task import Preparation

EDGE_BYTES = 128  # of memory for each edge of `GroupsTask`


class GroupsTask(DedupTask):
    """Writes the rows of groups of at least `min_size` documents, by range, from all edges."""

    kind: Literal["dedup-groups"] = "dedup-groups"
    edges: Output
    min_size: int

    def write(self, preparation: Preparation) -> None:
        """Holds all edges in memory."""
        plan = self.plan
        chunks = [np.empty((0, 2), dtype=np.int64)]
        for part in range(plan.ranges):
            chunks += read_part(preparation.folder, [self.edges], part, 2)
        edges = np.concatenate(chunks)
        del chunks
        edges = stars(edges)
        _, group, sizes = np.unique(edges[:, 1], return_inverse=True, return_counts=True)
        edges = edges[sizes[group] + 1 >= self.min_size]
        with ScatterWriter(self.output(preparation.folder), plan.ranges, plan.memory) as writer:
            writer.add(plan.range_of(edges[:, 0]), edges)


class _RangeTask(DedupTask):
    """A task on the edges of the documents of one range."""

    edges: Output

    def _to_earlier(self, preparation: Preparation) -> Iterator[Ints]:
        """Yields the edges from documents of the range to earlier ones."""
        return read_part(preparation.folder, [self.edges], self.number, 2)

    def _to_later(self, preparation: Preparation) -> Iterator[Ints]:
        """Yields the edges from later documents to those of the range."""
        return read_part(preparation.folder, [self.edges], self.plan.ranges + self.number, 2)

    def _earliest(self, preparation: Preparation) -> Ints:
        """The earliest neighbour of each document of the range, or itself."""
        start, stop = self.plan.bounds(self.number)
        earliest = np.arange(start, stop)
        for edges in self._to_earlier(preparation):
            np.minimum.at(earliest, edges[:, 0] - start, edges[:, 1])
        return earliest


class LargeStarTask(_RangeTask):
    """Connects the later neighbours of each document with its earliest one."""

    kind: Literal["dedup-large-star"] = "dedup-large-star"

    def write(self, preparation: Preparation) -> None:
        """Writes edges by the range of the later document."""
        plan = self.plan
        start, _ = plan.bounds(self.number)
        earliest = self._earliest(preparation)
        with ScatterWriter(self.output(preparation.folder), plan.ranges, plan.memory) as writer:
            for edges in self._to_later(preparation):
                end = earliest[edges[:, 1] - start]
                writer.changes += int((end != edges[:, 1]).sum())
                writer.add(plan.range_of(edges[:, 0]), pairs(edges[:, 0], end))


class SmallStarTask(_RangeTask):
    """Connects each document and its earlier neighbours with the earliest of them."""

    kind: Literal["dedup-small-star"] = "dedup-small-star"

    def write(self, preparation: Preparation) -> None:
        """Writes edges in the parts of `add_edges`."""
        plan = self.plan
        start, _ = plan.bounds(self.number)
        earliest = self._earliest(preparation)
        with ScatterWriter(self.output(preparation.folder), 2 * plan.ranges, plan.memory) as writer:
            for edges in self._to_earlier(preparation):
                end = earliest[edges[:, 0] - start]
                moved = end != edges[:, 1]
                writer.changes += int(moved.sum())
                add_edges(writer, self, pairs(edges[moved, 1], end[moved]))
            document = np.flatnonzero(earliest != np.arange(start, start + len(earliest)))
            add_edges(writer, self, pairs(document + start, earliest[document]))


class StarsTask(_RangeTask):
    """Writes the rows of groups of at least `min_size` documents, from stars around a range."""

    kind: Literal["dedup-stars"] = "dedup-stars"
    min_size: int

    def write(self, preparation: Preparation) -> None:
        """Counts the documents of each star, then writes them by range."""
        plan = self.plan
        start, stop = plan.bounds(self.number)
        sizes = np.ones(stop - start, dtype=np.int64)
        for edges in self._to_later(preparation):
            sizes += np.bincount(edges[:, 1] - start, minlength=len(sizes))
        with ScatterWriter(self.output(preparation.folder), plan.ranges, plan.memory) as writer:
            for edges in self._to_later(preparation):
                large = sizes[edges[:, 1] - start] >= self.min_size
                writer.add(plan.range_of(edges[large, 0]), edges[large])
