"""The sequence of stages, and which of their files are needed.

A stage's files are removed as soon as no later stage reads them. `progress.json` lists the complete
stages, so that a deduplication that was interrupted continues with the next one, although files of
earlier ones are gone. With other work items or another limit of memory, it begins again.
"""

import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from hashlib import sha256
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from data.config import FiltersConfig, Section
from data.files import write_atomically
from data.prepare.dedup.comparing import CompareTask, HeadsTask
from data.prepare.dedup.components import (
    EDGE_BYTES,
    GroupsTask,
    LargeStarTask,
    SmallStarTask,
    StarsTask,
)
from data.prepare.dedup.matching import KeysTask, MatchTask
from data.prepare.dedup.plan import DedupTask, Field, Plan, count_documents, first_file
from data.prepare.dedup.scatter import Output, dedup_folder
from data.prepare.dedup.verdicts import VerdictsTask, verdict_file
from data.prepare.signatures import SIGNATURE
from data.prepare.task import Preparation, Task
from data.prepare.work_item import WorkItem

_Make = Callable[..., DedupTask]
_Stage = Generator[list[Task], None, Output]
_KEY_BYTES, _VERDICT_DOCUMENTS = 16, 1 << 20
_VERDICTS = "verdicts"
_TOGETHER = 1 << 18  # documents whose comparison takes about as long as a worker's start


def stages(
    items: Sequence[WorkItem], folder: Path, filters: FiltersConfig, memory: int
) -> Iterator[list[Task]]:
    """Yields the tasks of each stage, which are to be done before the next one is asked for.

    The last stage leaves the verdicts on all work items; with `remove_dedup_files`, nothing else.

    Arguments:
        memory: limit of each task, beyond what a process needs anyway. [bytes]
    """
    deduplication = _Deduplication(items, folder, memory)
    documents = deduplication.plan.documents
    if documents > _TOGETHER:
        yield from deduplication.stages(filters)
    elif _VERDICTS not in deduplication.done:
        size = documents * SIGNATURE.itemsize
        yield [TogetherTask(name="deduplicate", size=size, filters=filters, memory=memory)]


class TogetherTask(Task):
    """All stages of a deduplication whose tasks are too small to be shared out."""

    kind: Literal["dedup-together"] = "dedup-together"
    filters: FiltersConfig
    memory: int

    def is_done(self, folder: Path) -> bool:
        """Whether the verdicts are complete."""
        progress = _read_progress(folder)
        return progress is not None and _VERDICTS in progress.done

    def run(self, preparation: Preparation, advance: Callable[[int], None]) -> None:
        """Runs one task after another."""
        deduplication = _Deduplication(preparation.items, preparation.folder, self.memory)
        for tasks in deduplication.stages(self.filters):
            for task in tasks:
                if not task.is_done(preparation.folder):
                    task.run(preparation, lambda _size: None)
        advance(self.size)


def remove_dedup_files(folder: Path) -> None:
    """Removes what only the deduplication needs, its verdicts excepted."""
    shutil.rmtree(dedup_folder(folder), ignore_errors=True)


class _Totals(Section):
    rows: int
    changes: int


class _Progress(Section):
    """What `progress.json` holds: the plan, and the totals of the complete stages."""

    plan: Plan
    done: dict[str, _Totals]

    def serves(self, plan: Plan) -> bool:
        """Whether what is done is of use for `plan`: verdicts do not depend on the memory."""
        if _VERDICTS in self.done:
            return self.plan.items == plan.items
        return self.plan == plan


def _progress_file(folder: Path) -> Path:
    return dedup_folder(folder) / "progress.json"


def _read_progress(folder: Path) -> _Progress | None:
    try:
        return _Progress.model_validate_json(_progress_file(folder).read_bytes())
    except (OSError, ValidationError):
        return None


class _Deduplication:
    """The stages of one deduplication, and what is complete of it."""

    def __init__(self, items: Sequence[WorkItem], folder: Path, memory: int) -> None:
        self.folder, self.names = folder, [item.name for item in items]
        self.first = count_documents(items, folder)
        self.plan = Plan(
            items=sha256(repr((self.names, self.first.tolist())).encode()).hexdigest(),
            documents=int(self.first[-1]),
            memory=memory,
        )
        self.done = self._earlier_progress()

    def _earlier_progress(self) -> dict[str, _Totals]:
        """The complete stages of the same plan; removes what another one left."""
        progress = _read_progress(self.folder)
        if progress is not None and progress.serves(self.plan):
            for partial_file in dedup_folder(self.folder).glob(".*"):
                partial_file.unlink(missing_ok=True)  # of a process that died
            return dict(progress.done)
        remove_dedup_files(self.folder)
        for name in self.names:
            verdict_file(name, self.folder).unlink(missing_ok=True)
        stream = BytesIO()
        np.save(stream, self.first, allow_pickle=False)
        write_atomically(first_file(self.folder), stream.getvalue())
        self._record({})
        return {}

    def _record(self, done: dict[str, _Totals]) -> None:
        progress = _Progress(plan=self.plan, done=done)
        write_atomically(_progress_file(self.folder), progress.model_dump_json())

    def stages(self, filters: FiltersConfig) -> Iterator[list[Task]]:
        """Yields the tasks of each stage that is left."""
        if _VERDICTS in self.done:
            return
        dropped: list[Output] = []
        if filters.exact_duplicates:
            keys = yield from self._keys("exact", dropped)
            dropped.append((yield from self._matches("exact", "exact", keys)))
        if (threshold := filters.near_duplicate_similarity) is not None:
            dropped.append((yield from self._groups("near", threshold, 2, dropped)))
        if (threshold := filters.template_similarity) is not None:
            min_size = filters.template_min_documents
            dropped.append((yield from self._groups("template", threshold, min_size, dropped)))
        yield self._verdicts(dropped)
        for output in dropped:
            output.remove(self.folder)
        self._record({_VERDICTS: _Totals(rows=0, changes=0)})

    def _keys(self, field: Field, dropped: list[Output]) -> _Stage:
        task: _Make = partial(KeysTask, field=field, dropped=tuple(dropped))
        return (yield from self._over_ranges(f"{field}-keys", task))

    def _matches(self, stage: str, field: Field, keys: Output) -> _Stage:
        plan = self.plan
        parts = plan.key_parts * plan.bands(field)
        size = plan.documents * plan.bands(field) * _KEY_BYTES
        tasks = [
            MatchTask(
                name=f"{stage}-{number:05d}",
                group=stage,
                size=size * (stop - start) // parts,
                plan=plan,
                stage=stage,
                number=number,
                field=field,
                start=start,
                stop=stop,
                keys=keys,
            )
            for number, (start, stop) in enumerate(plan.key_groups(field))
        ]
        return (yield from self._stage(tasks, keys))

    def _groups(
        self, field: Field, threshold: float, min_size: int, dropped: list[Output]
    ) -> _Stage:
        """The stages of one kind of signature; the result is the rows of what is dropped."""
        keys = yield from self._keys(field, dropped)
        matches = yield from self._matches(f"{field}-matches", field, keys)
        task: _Make = partial(HeadsTask, field=field, matches=matches)
        heads = yield from self._over_ranges(f"{field}-heads", task)
        task = partial(CompareTask, field=field, threshold=threshold, matches=matches, heads=heads)
        edges = yield from self._over_ranges(f"{field}-edges", task, matches, heads)
        # Each edge is there twice.
        if self.done[edges.stage].rows // 2 * EDGE_BYTES <= self.plan.memory:
            groups = GroupsTask(
                name=field,
                group=field,
                size=self.done[edges.stage].rows * _KEY_BYTES,
                plan=self.plan,
                stage=field,
                number=0,
                edges=edges,
                min_size=min_size,
            )
            return (yield from self._stage([groups], edges))
        stars = yield from self._stars(field, edges)
        task = partial(StarsTask, edges=stars, min_size=min_size)
        return (yield from self._over_ranges(field, task, stars))

    def _stars(self, field: Field, edges: Output) -> _Stage:
        """Rounds of large and small stars, until one changes nothing."""
        changes, number = 1, 0
        while changes:
            number += 1
            task: _Make = partial(LargeStarTask, edges=edges)
            large = yield from self._over_ranges(f"{field}-large-{number}", task, edges)
            task = partial(SmallStarTask, edges=large)
            edges = yield from self._over_ranges(f"{field}-small-{number}", task, large)
            changes = self.done[large.stage].changes + self.done[edges.stage].changes
        return edges

    def _over_ranges(self, stage: str, task: _Make, *unneeded: Output) -> _Stage:
        """A stage of one task for each range."""
        plan = self.plan
        tasks = []
        for number in range(plan.ranges):
            start, stop = plan.bounds(number)
            size = (stop - start) * SIGNATURE.itemsize
            name = f"{stage}-{number:05d}"
            tasks.append(
                task(name=name, group=stage, size=size, plan=plan, stage=stage, number=number)
            )
        return (yield from self._stage(tasks, *unneeded))

    def _stage(self, tasks: Sequence[DedupTask], *unneeded: Output) -> _Stage:
        """Has the tasks done unless they are; then removes files that nothing needs any more."""
        output = Output(stage=tasks[0].stage, count=len(tasks))
        if output.stage not in self.done:
            yield list(tasks)
            rows, changes = output.totals(self.folder)
            self.done[output.stage] = _Totals(rows=rows, changes=changes)
            self._record(self.done)
        for files in unneeded:
            files.remove(self.folder)
        return output

    def _verdicts(self, dropped: list[Output]) -> list[Task]:
        """Tasks of work items with about `_VERDICT_DOCUMENTS` documents."""
        group = self.first[:-1] // _VERDICT_DOCUMENTS
        bounds = [*np.flatnonzero(np.diff(group, prepend=-1)).tolist(), len(group)]
        tasks: list[Task] = []
        for start, stop in pairwise(bounds):
            documents = int(self.first[stop] - self.first[start])
            tasks.append(
                VerdictsTask(
                    name=f"{_VERDICTS}-{len(tasks):05d}",
                    group=_VERDICTS,
                    size=documents * SIGNATURE.itemsize,
                    plan=self.plan,
                    first=start,
                    names=tuple(self.names[start:stop]),
                    dropped=tuple(dropped),
                )
            )
        return tasks
