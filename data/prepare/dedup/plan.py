"""How documents are shared out to tasks, and the signatures that a task reads.

Documents are numbered through all work items, in order: 0 to D - 1. A range is `range_size`
documents that follow each other; where it begins and ends has nothing to do with work items.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.config import Section
from data.errors import DataError
from data.prepare.dedup.kernels import Ints, band_keys
from data.prepare.dedup.scatter import Output, dedup_folder, output_path, read_part
from data.prepare.filters import KEPT
from data.prepare.signatures import (
    NEAR_ROWS,
    NEAR_SLOTS,
    SIGNATURE,
    TEMPLATE_ROWS,
    TEMPLATE_SLOTS,
)
from data.prepare.task import Preparation, Task
from data.prepare.work_item import WorkItem

Field = Literal["exact", "near", "template"]
SLOTS = {"exact": 0, "near": NEAR_SLOTS, "template": TEMPLATE_SLOTS}
_ROWS = {"near": NEAR_ROWS, "template": TEMPLATE_ROWS}
_BLOCK = 1 << 13  # documents that are read together

# Bytes of memory for each document of a range: 16 pairs, sorted; for each key of a part: twice a
# growing hash table, since what is written takes the other half.
_RANGE_BYTES, _KEY_BYTES = 1 << 11, 192
# Sizes of work that are worth a task: documents of a range, ranges, keys.
_RANGE_SIZE, _RANGES, _KEYS = 1 << 20, 1 << 12, 1 << 22


class Plan(Section):
    """The shares of a deduplication.

    Attributes:
        items: digest of the names of the work items and their numbers of documents.
        documents: D.
        memory: limit of a task, beyond what a process needs anyway. [bytes]
    """

    items: str
    documents: int
    memory: int

    @property
    def range_size(self) -> int:
        """Documents of a range."""
        most = max(_RANGE_SIZE, -(-self.documents // _RANGES))
        return max(1, min(self.memory // _RANGE_BYTES, most))

    @property
    def ranges(self) -> int:
        """Number of ranges, at least 1."""
        return max(1, -(-self.documents // self.range_size))

    @property
    def key_parts(self) -> int:
        """Number of parts of the keys of one band."""
        return max(1, -(-self.documents * _KEY_BYTES // self.memory))

    def bands(self, field: Field) -> int:
        """Keys of a document."""
        return SLOTS[field] // _ROWS[field] if field in _ROWS else 1

    def key_groups(self, field: Field) -> list[tuple[int, int]]:
        """The parts (start, stop) of the keys of all bands that each task reads."""
        parts = self.key_parts * self.bands(field)
        tasks = min(parts, max(1, self.documents * self.bands(field) // _KEYS))
        bounds = [parts * task // tasks for task in range(tasks + 1)]
        return list(pairwise(bounds))

    def bounds(self, number: int) -> tuple[int, int]:
        """(first document, end) of a range."""
        start = number * self.range_size
        return start, min(self.documents, start + self.range_size)

    def range_of(self, documents: Ints) -> Ints:
        """The range of each document."""
        return documents // self.range_size


class DedupTask(Task):
    """A task of a stage, whose result is one file of rows in parts."""

    plan: Plan
    stage: str
    number: int

    def output(self, folder: Path) -> Path:
        """The file of the result."""
        return output_path(folder, self.stage, self.number)

    def is_done(self, folder: Path) -> bool:
        """Whether the file is there."""
        return self.output(folder).exists()

    def run(self, preparation: Preparation, advance: Callable[[int], None]) -> None:
        """Leaves the file in the folder."""
        self.write(preparation)
        advance(self.size)

    @abstractmethod
    def write(self, preparation: Preparation) -> None:
        """Writes the file."""


def pairs(first: Ints, second: Ints) -> Ints:
    """Rows [N, 2]."""
    return np.stack([first, second], axis=1)


def read_pairs(folder: Path, inputs: Sequence[Output], part: int) -> Ints:
    """All rows [N, 2] of a part together."""
    return np.concatenate([np.empty((0, 2), np.int64), *read_part(folder, inputs, part, 2)])


def keys_of(records: NDArray[Any], field: Field) -> NDArray[np.uint64]:
    """The keys [N, B] of SIGNATURE records: the hash of the text, or one for each band."""
    if field == "exact":
        return np.array(records["exact"])[:, None]
    return np.asarray(band_keys(np.ascontiguousarray(records[field]), _ROWS[field]))


class SignatureFiles:
    """The signatures of all work items, read in the order of their documents."""

    def __init__(self, preparation: Preparation) -> None:
        self.folder, self.items = preparation.folder, preparation.items

    @cached_property
    def first(self) -> Ints:
        """The number of each work item's first document, and D."""
        return np.asarray(np.load(first_file(self.folder), allow_pickle=False))

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yields (number of the first document, records) of the documents from start to stop."""
        if start >= stop:
            return
        item = int(np.searchsorted(self.first, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self.first[item + 1]))
            if start < end:
                with signature_file(self.items[item].name, self.folder).open("rb") as stream:
                    stream.seek((start - int(self.first[item])) * SIGNATURE.itemsize)
                    for begin in range(start, end, _BLOCK):
                        records = np.fromfile(stream, SIGNATURE, min(_BLOCK, end - begin))
                        if len(records) < min(_BLOCK, end - begin):
                            raise DataError(
                                f"{stream.name} was truncated meanwhile; run the command again."
                            )
                        yield begin, records
            start, item = end, item + 1

    def selected(self, documents: Ints) -> Iterator[tuple[int, int, NDArray[Any]]]:
        """Yields (begin, end, records): each block that has one of some sorted documents.

        documents[begin:end] are those in the block, which has the records from the first of them to
        the last.
        """
        begin = 0
        while begin < len(documents):
            block_stop = documents[begin] + _BLOCK
            # A document may be there once for each range: few enough copies of its signature.
            end = min(int(np.searchsorted(documents, block_stop)), begin + 2 * _BLOCK)
            rows = [
                records
                for _, records in self.blocks(int(documents[begin]), int(documents[end - 1]) + 1)
            ]
            yield begin, end, np.concatenate(rows) if len(rows) > 1 else rows[0]
            begin = end


def kept_mask(preparation: Preparation, plan: Plan, dropped: Sequence[Output], number: int) -> Any:
    """True [documents of the range] where no earlier stage has dropped the document."""
    start, stop = plan.bounds(number)
    kept = np.ones(stop - start, dtype=np.bool_)
    for rows in read_part(preparation.folder, dropped, number, 2):
        kept[rows[:, 0] - start] = False
    return kept


def is_kept(records: NDArray[Any]) -> NDArray[np.bool_]:
    """True where a record passed the filters of single documents."""
    return np.asarray(records["reason"] == KEPT)


def signature_file(name: str, folder: Path) -> Path:
    """The SIGNATURE records of a work item, by its name."""
    return folder / f"{name}.filter.bin"


def first_file(folder: Path) -> Path:
    """The numbers of the work items' first documents."""
    return dedup_folder(folder) / "first.npy"


def count_documents(items: Sequence[WorkItem], folder: Path) -> Ints:
    """The number of each work item's first document, and D; from the sizes of files."""
    sizes = [signature_file(item.name, folder).stat().st_size for item in items]
    return np.cumsum([0, *(size // SIGNATURE.itemsize for size in sizes)])
