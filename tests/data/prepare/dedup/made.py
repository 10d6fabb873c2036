"""Made-up signatures, and the deduplication of what fits in memory, to compare with."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.config import FiltersConfig, SourceConfig
from data.prepare.dedup import VERDICT, stages
from data.prepare.engines.kinds import read_tasks, write_tasks
from data.prepare.filters import EXACT, KEPT, LENGTH, NEAR, TEMPLATE
from data.prepare.signatures import (
    NEAR_ROWS,
    NEAR_SLOTS,
    SIGNATURE,
    TEMPLATE_ROWS,
    TEMPLATE_SLOTS,
)
from data.prepare.task import Preparation, Task
from data.prepare.work_item import WorkItem

SOURCE = SourceConfig(name="made", paths=("x",))


def made_signatures(rng: np.random.Generator, count: int, originals: int) -> NDArray[Any]:
    """Signatures of documents that are changed copies of some originals, and of each other."""
    records = np.zeros(count, dtype=SIGNATURE)
    records["exact"] = rng.integers(0, 2 * count, count)
    for field, slots in (("near", NEAR_SLOTS), ("template", TEMPLATE_SLOTS)):
        values = rng.integers(0, 1 << 32, (count, slots), dtype=np.uint32)
        for i in range(originals, count):  # chains: a copy of any earlier document
            same = rng.random(slots) < rng.choice([0.6, 0.8, 0.9, 0.95, 1.0])
            values[i, same] = values[rng.integers(0, i if rng.random() < 0.5 else originals), same]
        records[field] = values[rng.permutation(count)]
    records["reason"] = np.where(rng.random(count) < 0.1, LENGTH, KEPT)
    return records


def write_items(folder: Path, records: NDArray[Any], cuts: Sequence[int]) -> tuple[WorkItem, ...]:
    """Divides the documents into work items, whose signatures are written."""
    parts = np.split(records, cuts)
    items = tuple(WorkItem(source=SOURCE, number=i, pieces=()) for i in range(len(parts)))
    for item, part in zip(items, parts, strict=True):
        (folder / f"{item.name}.filter.bin").write_bytes(part.tobytes())
    return items


def preparation(folder: Path, items: tuple[WorkItem, ...]) -> Preparation:
    return Preparation(None, folder, items, lambda: None)  # type: ignore[arg-type, return-value]


def run_stages(
    folder: Path,
    items: tuple[WorkItem, ...],
    filters: FiltersConfig,
    memory: int,
    rng: np.random.Generator,
) -> list[list[Task]]:
    """Runs all tasks in any order, some of them twice, as they arrive at another host."""
    done = []
    file = folder / "tasks.json"
    for tasks in stages(items, folder, filters, memory):
        done.append(tasks)
        write_tasks(file, tasks)
        read = read_tasks(file)
        assert read == tasks and not any(task.is_done(folder) for task in read)
        for i in [*rng.permutation(len(tasks)), *rng.integers(0, len(tasks), 2)]:
            read[i].run(preparation(folder, items), lambda _size: None)
            assert read[i].is_done(folder)
    file.unlink(missing_ok=True)
    return done


def expected(records: NDArray[Any], cuts: Sequence[int], filters: FiltersConfig) -> list[Any]:
    """The VERDICTs of each work item, by dictionaries."""
    reason = records["reason"].copy()
    original = np.full(len(records), -1)
    for document, head in _repeats(records["exact"][:, None], reason == KEPT):
        if filters.exact_duplicates:
            reason[document], original[document] = EXACT, head
    for field, rows, number, threshold, least in (
        ("near", NEAR_ROWS, NEAR, filters.near_duplicate_similarity, 2),
        (
            "template",
            TEMPLATE_ROWS,
            TEMPLATE,
            filters.template_similarity,
            filters.template_min_documents,
        ),
    ):
        if threshold is None:
            continue
        values, kept = records[field], reason == KEPT
        group = np.arange(len(records))
        for band in range(0, values.shape[1], rows):
            for document, head in _repeats(values[:, band : band + rows], kept):
                if (values[document] == values[head]).mean() >= threshold:
                    both = group[document], group[head]
                    group[group == max(both)] = min(both)
        for first in np.unique(group):
            members = np.flatnonzero(group == first)
            if len(members) >= least:
                reason[members[1:]], original[members[1:]] = number, first
    first = np.array([0, *cuts])
    verdicts = np.zeros(len(records), dtype=VERDICT)
    verdicts["reason"] = reason
    verdicts["item"] = np.where(original < 0, -1, first.searchsorted(original, "right") - 1)
    verdicts["document"] = original - np.where(original < 0, 0, first[verdicts["item"]])
    return np.split(verdicts, cuts)


def _repeats(keys: NDArray[Any], kept: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(document, the first one with the same key) of those that have an earlier one."""
    of_key: dict[bytes, list[int]] = defaultdict(list)
    for document in np.flatnonzero(kept).tolist():
        of_key[keys[document].tobytes()].append(document)
    return [(document, documents[0]) for documents in of_key.values() for document in documents[1:]]
