"""The work items of `prepare`: some files of one source, which become one part of its shards."""

from collections.abc import Iterable, Iterator

from data.config import Section, SourceConfig
from data.prepare.corpus import Corpus, Document
from data.prepare.pieces import Piece

_BATCH_CHARACTERS = 4_000_000
_ITEM_BYTES = 64 << 20  # decides which documents share a part: part of the shards' format


class WorkItem(Section):
    """Pieces of the files of one source that become one part; none for a dataset of the hub."""

    source: SourceConfig
    number: int
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        """The source and the number of the part."""
        return f"{self.source.name}-{self.number:05d}"

    @property
    def size(self) -> int:
        """Bytes of the pieces."""
        return sum(piece.size for piece in self.pieces)


def work_items(corpus: Corpus) -> list[WorkItem]:
    """The files of a source in order, grouped into work items of about `_ITEM_BYTES`."""
    groups: list[list[Piece]] = [[]]
    size = 0
    for piece in corpus.pieces:
        if size >= _ITEM_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.size
    return [
        WorkItem(source=corpus.source, number=i, pieces=tuple(pieces))
        for i, pieces in enumerate(groups)
    ]


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
