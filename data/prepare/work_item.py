"""The work items of `prepare`: pieces of one source's files that become one part of its shards."""

import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from data.activity import print_line
from data.config import SourceConfig
from data.errors import DataError
from data.prepare.corpus import Corpus, Document
from data.prepare.pieces import Piece
from data.prepare.readers import divide
from data.section import Section

_BATCH_CHARACTERS = 4_000_000
_ITEM_BYTES = 64 << 20  # decides which documents share a part: part of the shards' format
_AT_ONCE = 16  # files that are opened to be divided


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
    """The files of a source in order, grouped into work items of about `_ITEM_BYTES`.

    A file of twice that size or more is divided into items of its own, where it can be; otherwise
    a line on stderr names it. Raises DataError where such a file cannot be opened.
    """
    groups: list[list[Piece]] = []
    size = _ITEM_BYTES  # of the last group
    for pieces in _divided(corpus):
        if len(pieces) > 1:
            groups += [[piece] for piece in pieces]
            size = _ITEM_BYTES
            continue
        if size >= _ITEM_BYTES:
            groups.append([])
            size = 0
        groups[-1] += pieces
        size += pieces[0].size
    return [
        WorkItem(source=corpus.source, number=i, pieces=tuple(pieces))
        for i, pieces in enumerate(groups or [[]])
    ]


def _divided(corpus: Corpus) -> list[list[Piece]]:
    """The pieces of each file."""

    def pieces_of(file: Piece) -> list[Piece] | str:
        if file.size < 2 * _ITEM_BYTES or not file.is_whole:
            return [file]
        try:
            return divide(corpus.source, file, _ITEM_BYTES)
        except OSError as error:
            raise DataError(f"cannot read {file.path}: {error.strerror or error}.") from error

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        pieces = list(pool.map(pieces_of, corpus.pieces))
    reasons = {
        file.path: why
        for file, why in zip(corpus.pieces, pieces, strict=True)
        if isinstance(why, str)
    }
    if reasons:
        file, why = next(iter(reasons.items()))
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        print_line(
            f"v4: source {corpus.source.name!r}: {file}{more} cannot be divided among processes: "
            f"it {why}",
            sys.stderr,
        )
    return [
        [file] if isinstance(parts, str) else parts
        for file, parts in zip(corpus.pieces, pieces, strict=True)
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
