"""The filter pass of `prepare`: every document is judged, then all are deduplicated together.

The pass reads each work item once, before it is tokenised, and writes `NAME.filter.bin` (one
SIGNATURE per document) and last `NAME.filter.json`. When all items have one, the deduplication
compares them and writes `NAME.verdicts.npy`: a function of the sources and the filters, not of the
processes. While the documents are tokenised, a `VerdictFilter` drops and counts them. All files of
the pass are removed when the shards are complete.
"""

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from data.config import FiltersConfig
from data.errors import DataError
from data.files import fsync_file, write_atomically
from data.manifest import MAX_EXAMPLES, Example, FilterStats
from data.prepare.corpus import BadRecord, Corpus, Document
from data.prepare.dedup import remove_dedup_files, signature_file, verdict_file
from data.prepare.filters import KEPT, ORDER, REASONS, Rules
from data.prepare.signatures import SIGNATURE, signatures
from data.prepare.task import Preparation, Task
from data.prepare.work_item import WorkItem, batches

_SUFFIXES = ("filter.bin", "filter.json", "verdicts.npy")
_EXAMPLE_CHARACTERS = 300


class _FilterRecord(BaseModel):
    """Marks a work item whose signatures are complete."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents: int


class FilterTask(Task):
    """Judges and signs the documents of one work item, whose name it has."""

    kind: Literal["filter"] = "filter"
    item: int

    def is_done(self, folder: Path) -> bool:
        """Whether the signatures are complete."""
        try:
            content = (folder / f"{self.name}.filter.json").read_bytes()
            record = _FilterRecord.model_validate_json(content)
            size = signature_file(self.name, folder).stat().st_size
        except (OSError, ValidationError):
            return False
        return size == record.documents * SIGNATURE.itemsize

    def run(self, preparation: Preparation, advance: Callable[[int], None]) -> None:
        """Leaves the signatures in the folder."""
        config = preparation.config
        assert config.filters is not None
        tolerant = config.max_bad_record_fraction > 0
        item = preparation.items[self.item]
        filter_item(item, preparation.folder, config.filters, tolerant, advance)


def filter_item(
    item: WorkItem,
    folder: Path,
    filters: FiltersConfig,
    tolerant: bool,
    advance: Callable[[int], None],
) -> None:
    """Applies the rules of single documents to a work item, and signs the documents that pass.

    `advance` is called with the UTF-8 bytes of the documents processed.
    """
    rules = Rules(filters, item.source)
    partial = folder / f".{item.name}.filter.{secrets.token_hex(8)}"
    bad: list[BadRecord] | None = [] if tolerant else None
    count = 0
    try:
        with partial.open("wb") as stream:
            for raw_batch in batches(Corpus(item.source, item.pieces).documents(bad)):
                batch = [rules.masker.masked(document) for document in raw_batch]
                reasons = np.array([rules.judge(document)[0] for document in batch], dtype=np.uint8)
                records = np.zeros(len(batch), dtype=SIGNATURE)
                passed = np.flatnonzero(reasons == KEPT)
                records[passed] = signatures([batch[i].text for i in passed])
                records["reason"] = reasons
                stream.write(records.tobytes())
                count += len(batch)
                advance(sum(len(document.text.encode()) for document in raw_batch))
        fsync_file(partial)
        os.replace(partial, signature_file(item.name, folder))
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    record = _FilterRecord(documents=count)
    write_atomically(folder / f"{item.name}.filter.json", record.model_dump_json())


def _verdicts_of(item: WorkItem, folder: Path) -> NDArray[Any]:
    """The VERDICT of each document; DataError where they cannot be read."""
    file = verdict_file(item.name, folder)
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}; delete it and run again.") from error


def remove_filter_files(folder: Path) -> None:
    """Removes the files that only the filter pass needs."""
    for suffix in _SUFFIXES:
        for file in folder.glob(f"*.{suffix}"):
            file.unlink()
    remove_dedup_files(folder)


@dataclass(frozen=True)
class FilterSettings:
    """The filters, and the names of all work items in order, which verdicts refer to by number."""

    filters: FiltersConfig
    item_names: tuple[str, ...]


class VerdictFilter:
    """Drops the documents of a work item that its verdicts reject, and counts them by reason.

    Attributes:
        masked: the documents in which personal information was replaced, and its bytes.

    Raises DataError where the work item no longer has the documents that were judged.
    """

    def __init__(self, settings: FilterSettings, item: WorkItem, folder: Path) -> None:
        self.item, self.item_names = item, settings.item_names
        self.rules = Rules(settings.filters, item.source)
        self.verdicts = _verdicts_of(item, folder)
        self.position = 0
        self.masked = FilterStats() if self.rules.masker.is_masking else None
        self._stats: dict[str, FilterStats] = {}

    def keep(self, documents: list[Document]) -> list[Document]:
        """The next documents of the work item, masked, without the rejected ones."""
        verdicts = self.verdicts[self.position : self.position + len(documents)]
        self.position += len(documents)
        if len(verdicts) != len(documents):
            raise self._changed()
        accepted = []
        for raw, verdict in zip(documents, verdicts, strict=True):
            document = self.rules.masker.masked(raw)
            if verdict["reason"] != KEPT:
                self._count(document, verdict)
                continue
            accepted.append(document)
            if self.masked is not None and document is not raw:
                self.masked = self.rules.masker.stats(raw, document, self.masked)
        return accepted

    def _count(self, document: Document, verdict: tuple[int, int, int]) -> None:
        reason_number, item, original = map(int, verdict)
        reason = REASONS[reason_number]
        stats = self._stats.get(reason, FilterStats())
        examples: tuple[Example, ...] = ()
        if len(stats.examples) < MAX_EXAMPLES:
            detail = self.rules.masker.shown(self.rules.judge(document)[1])
            if item >= 0:
                detail = f"like document {original} of {self.item_names[item]}"
            text = self.rules.masker.shown(document.text)[:_EXAMPLE_CHARACTERS]
            examples = (Example(text=text, detail=detail),)
        one = FilterStats(documents=1, bytes=len(document.text.encode()), examples=examples)
        self._stats[reason] = stats.plus(one)

    def stats(self) -> dict[str, FilterStats]:
        """What each filter dropped, once all documents have been read."""
        if self.position != len(self.verdicts):
            raise self._changed()
        return {reason: self._stats[reason] for reason in ORDER if reason in self._stats}

    def _changed(self) -> DataError:
        return DataError(
            f"{self.item.name} holds other documents than when it was filtered; its files changed "
            "while they were read, run the command again."
        )
