"""The work items of `prepare`: some files of one source, which become one part of its shards."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.config import SourceConfig
from data.prepare.corpus import Corpus, Document

_BATCH_CHARACTERS = 4_000_000
_ITEM_BYTES = 64 << 20  # decides which documents share a part: part of the shards' format


@dataclass(frozen=True)
class WorkItem:
    """Files of one source that become one part; no files for a dataset of the hub."""

    source: SourceConfig
    number: int
    files: tuple[Path, ...]

    @property
    def name(self) -> str:
        """The source and the number of the part."""
        return f"{self.source.name}-{self.number:05d}"

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(file.stat().st_size for file in self.files)


def work_items(corpus: Corpus) -> list[WorkItem]:
    """The files of a source in order, grouped into work items of about `_ITEM_BYTES`."""
    if not corpus.files:
        return [WorkItem(corpus.source, 0, ())]
    groups: list[list[Path]] = [[]]
    size = 0
    for file in corpus.files:
        if size >= _ITEM_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.stat().st_size
    return [WorkItem(corpus.source, i, tuple(files)) for i, files in enumerate(groups)]


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yields batches of about `_BATCH_CHARACTERS`, enough work for the tokenizer's threads."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
