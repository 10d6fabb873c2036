"""The texts that a tokenizer is trained on: a random sample of the train split of the sources.

Where the sources are small, all documents are read, and those with the lowest hashes are the
sample. Otherwise only as much as the sample needs is read, several times over: pieces of files, of
every source in proportion to its share, in the order of a hash of the source's name, the file's
number and where the piece begins.
"""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from data.activity import Activity, print_line
from data.config import DataConfig, SourceConfig
from data.errors import DataError
from data.prepare.corpus import BadRecord, Corpus, Document, no_document, require_few_bad
from data.prepare.filters import Masker
from data.prepare.pieces import Piece
from data.prepare.readers import divide
from data.prepare.splits import document_hash, is_validation

_WHOLE_BYTES = 1 << 30
_WHOLE_SAMPLES = 16
"""Of files up to this many bytes, or samples, all is read."""
_MARGIN = 4  # times the sample that is read
_PIECES = 16  # at least, of a source that is not read whole
_MIN_PIECE_BYTES = 1 << 20


def sample_texts(config: DataConfig) -> list[str]:
    """About `config.tokenizer.sample_bytes` of text. Raises DataError for what cannot be read."""
    limit = max(_WHOLE_BYTES, _WHOLE_SAMPLES * config.tokenizer.sample_bytes)
    names = set(config.source_weights)
    sources = [s for s in config.sources if not names or config.source_weights.get(s.name)]
    readers = [_Reader(config, source, limit) for source in sources]
    if sum(reader.stored for reader in readers) <= limit:
        return _of_all(config, readers)
    return _of_pieces(config, readers)


@dataclass
class _Reader:
    """Reads a source for the sample, and counts.

    Attributes:
        limit: bytes of text after which a dataset of the hub, whose size is unknown, is left.
        text: UTF-8 bytes of documents of the train split that were read.
        whole_stored, whole_text: bytes of the pieces that were read to their end, and of their
            text.
        files: numbers of the files that were read.
    """

    config: DataConfig
    source: SourceConfig
    limit: int
    text: int = 0
    documents_read: int = 0
    whole_stored: int = 0
    whole_text: int = 0
    files: set[object] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.corpus = Corpus(self.source)
        self.stored = sum(piece.size for piece in self.corpus.pieces)
        self._masker = Masker(self.config.filters, self.source)
        self._bad: list[BadRecord] = []

    def documents(self, corpus: Corpus) -> Iterator[Document]:
        """The documents of the train split, masked."""
        tolerant = self.config.max_bad_record_fraction > 0
        for raw in corpus.documents(self._bad if tolerant else None):
            self.documents_read += 1
            document = self._masker.masked(raw)
            if not is_validation(self.source, document.text, self.config.validation_fraction):
                self.text += len(document.text.encode())
                yield document

    def all(self, activity: Activity) -> Iterator[Document]:
        """All documents; of a dataset of the hub, up to the limit."""
        for document in self.documents(self.corpus):
            yield document
            activity.done = self.text / 1e6
            if self.source.dataset is not None and self.text > self.limit:
                print_line(
                    f"source {self.source.name!r}: the sample is taken from the first "
                    f"{self.text / 1e6:,.0f} MB of {self.source.dataset}"
                )
                return
        self._check(self.corpus.empty)

    def some(self, target: int, activity: Activity) -> Iterator[Document]:
        """Documents of about `target` bytes of text, from pieces in the order of their hashes."""
        if self.source.dataset is not None:
            self.limit = target
            yield from self.all(activity)
            return
        start, empty = self.text, 0
        numbers = {piece.path: number for number, piece in enumerate(self.corpus.pieces)}
        for piece in self._pieces(max(_MIN_PIECE_BYTES, target // _PIECES)):
            self.files.add(numbers[piece.path])
            corpus, before = Corpus(self.source, [piece]), self.text
            share = self.corpus.pieces[numbers[piece.path]].size / self.stored
            most = target * max(1 / _PIECES, share)  # of a file that cannot be divided
            for document in self.documents(corpus):
                yield document
                activity.advance(len(document.text.encode()) / 1e6)
                if self.text - before >= most:
                    break
            else:
                self.whole_stored += piece.size
                self.whole_text += self.text - before
            empty += corpus.empty
            if self.text - start >= target:
                break
        self._check(empty)

    def _pieces(self, part_bytes: int) -> Iterator[Piece]:
        """One piece of each file, then another of each, and so on."""
        name = self.source.name
        files = sorted(enumerate(self.corpus.pieces), key=lambda f: document_hash(f"{name} {f[0]}"))
        remaining: list[list[Piece]] = []
        for number, file in files:
            pieces: list[Piece] | str = [file]
            if file.size >= 2 * part_bytes:
                try:
                    pieces = divide(self.source, file, part_bytes)
                except OSError as error:
                    raise DataError(f"cannot read {file.path}: {error.strerror}.") from error
            parts = [file] if isinstance(pieces, str) else pieces
            parts.sort(key=lambda p: document_hash(f"{name} {number} {p.start}"), reverse=True)
            yield parts.pop()
            if parts:
                remaining.append(parts)
        while remaining:
            for parts in remaining:
                yield parts.pop()
            remaining = [parts for parts in remaining if parts]

    @property
    def text_of_all(self) -> float:
        """About how much text all files have; as much as they are large where that is unknown."""
        if not self.whole_stored:
            return float(self.stored)
        return self.stored * self.whole_text / self.whole_stored

    def _check(self, empty: int) -> None:
        """Raises DataError for a source without documents, or with too many bad records."""
        if bad := self._bad:
            first = f"the first is {bad[0].place}, which {bad[0].reason}"
            total = self.documents_read + empty + len(bad)
            most = self.config.max_bad_record_fraction
            require_few_bad(self.source, len(bad), total, most, first)
            print_line(f"source {self.source.name!r}: {len(bad)} bad records skipped; {first}")
        if not self.documents_read:
            files = len(self.corpus.files)
            raise no_document(self.source, files, empty, self.corpus.empty_files)


def _of_all(config: DataConfig, readers: list[_Reader]) -> list[str]:
    """The documents with the lowest hashes: of all sources together, or by their weights."""
    size = config.tokenizer.sample_bytes
    groups = [(readers, size)]
    if config.source_weights:
        groups = [([reader], _share(config, reader, size)) for reader in readers]
    texts: list[str] = []
    for group, limit in groups:
        names = ", ".join(reader.source.name for reader in group)
        total = sum(reader.stored for reader in group) / 1e6
        with Activity(f"reading a sample of {names}", total, "MB") as activity:
            documents = (d for reader in group for d in reader.all(activity))
            texts += lowest_hashes(documents, limit)
    return texts


def _of_pieces(config: DataConfig, readers: list[_Reader]) -> list[str]:
    """Of each source its share: by weight, or by how much text its files would have."""
    size = config.tokenizer.sample_bytes
    stored = sum(reader.stored for reader in readers)
    unknown = [reader.source.name for reader in readers if reader.source.dataset is not None]
    if unknown and not config.source_weights:
        raise DataError(
            f"the size of {unknown[0]!r}, a dataset of the hub, is unknown, and the other sources "
            "are too large to be read whole; set data.source_weights."
        )
    samples = []
    for reader in readers:
        share = _share(config, reader, size) if unknown or config.source_weights else 0
        target = _MARGIN * (share or max(1, size * reader.stored // stored))
        name = reader.source.name
        with Activity(f"reading a sample of {name}", target / 1e6, "MB") as activity:
            samples.append(lowest_hashes(reader.some(target, activity), size))
    texts_of = [reader.text_of_all for reader in readers]
    texts: list[str] = []
    for reader, sample, text in zip(readers, samples, texts_of, strict=True):
        limit = round(size * text / max(1.0, sum(texts_of)))
        if config.source_weights:
            limit = _share(config, reader, size)
        part = list(_up_to(sample, limit))
        print_line(
            f"source {reader.source.name!r}: read {reader.text / 1e6:,.1f} MB of text in "
            f"{len(reader.files):,} of {len(reader.corpus.pieces):,} files of "
            f"{reader.stored / 1e6:,.0f} MB; "
            f"{sum(len(t.encode()) for t in part) / 1e6:,.1f} MB are in the sample"
        )
        texts += part
    return texts


def _share(config: DataConfig, reader: _Reader, size: int) -> int:
    """The bytes of a source by its weight."""
    weights = config.source_weights
    return max(1, int(size * weights[reader.source.name] / sum(weights.values())))


def _up_to(texts: Iterable[str], limit: int) -> Iterator[str]:
    total = 0
    for text in texts:
        total += len(text.encode())
        if total > limit:
            return
        yield text


def lowest_hashes(documents: Iterable[Document], limit: int) -> list[str]:
    """The texts of the documents with the lowest hashes, up to `limit` UTF-8 bytes.

    They are sorted by hash, without special tokens. Memory stays within `limit` and one document. A
    document that alone exceeds the limit is cut to `limit` characters.
    """
    sample: list[tuple[int, int, str]] = []  # a heap of (-hash, bytes, text), highest hash first
    bound = 1 << 64  # the lowest hash removed so far; higher hashes cannot be in the sample
    total = 0
    for document in documents:
        if (number := document_hash(document.text)) >= bound:
            continue
        text = "\n".join(document.plain)
        size = len(text.encode())
        heapq.heappush(sample, (-number, size, text))
        total += size
        while total > limit and len(sample) > 1:
            highest, size, _ = heapq.heappop(sample)
            bound = -highest
            total -= size
    return [text[:limit] for _, _, text in sorted(sample, reverse=True)]
