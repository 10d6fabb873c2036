"""The documents of a source, with errors that name the file and the line."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from data.config import SourceConfig
from data.errors import DataError
from data.prepare.find_files import find_files, identity
from data.prepare.pieces import Piece
from data.prepare.readers import (
    Record,
    field_of,
    name_of,
    read_dataset,
    read_records,
    repeated_key,
    with_remedy,
)
from data.text import OWN_PROMPTS, Special, read_messages, read_prompts, render

_MAX_CHARACTERS = 10**9


class BadRecord(NamedTuple):
    """A record that is not a document: where it is, its number in the file, and the reason."""

    place: str
    number: int
    reason: str


class Document(NamedTuple):
    """One document: its text, and the segments of a conversation (`data.text.render`)."""

    text: str
    segments: tuple[str, ...] | None = None

    @property
    def plain(self) -> tuple[str, ...]:
        """Its segments without the special tokens."""
        if self.segments is None:
            return (self.text,)
        return tuple(s for s in self.segments if not isinstance(s, Special))


class Corpus:
    """The documents of one source, in a fixed order, streamed without a cache.

    In `format: text` line ends become "\\n"; the other formats keep every character.

    Arguments:
        source: its configuration.
        pieces: read these pieces of its files only; by default, all files that its paths match.

    Attributes:
        files: all that its paths match, sorted; none of a hub dataset or where pieces are given.
        pieces: what is read of its files, in order.
        prompts: the prompt texts of conversations.
        empty: documents skipped by the last iteration because they have no visible character.
        empty_files: files in which it read no record.

    Raises DataError for a path that matches nothing, text that is not UTF-8, a compressed file that
    is cut off, a record without the text field or longer than 10^9 characters, and a source without
    any document.
    """

    def __init__(self, source: SourceConfig, pieces: Sequence[Piece] | None = None) -> None:
        self.source = source
        self.files = find_files(source) if pieces is None else []
        if pieces is None:
            pieces = [Piece(path=file.path, size=file.size) for file in self.files]
        self.pieces = tuple(pieces)
        file = source.prompts_file
        self.prompts = OWN_PROMPTS if file is None else read_prompts(file)
        self.empty = self.empty_files = 0
        self._bad: list[BadRecord] | None = None

    def __iter__(self) -> Iterator[Document]:
        count = 0
        for document in self.documents():
            count += 1
            yield document
        if not count:
            raise no_document(self.source, len(self.pieces), self.empty, self.empty_files)

    def documents(self, bad: list[BadRecord] | None = None) -> Iterator[Document]:
        """Yields the documents, if any; bad records are appended to `bad`, or raise without it."""
        self.empty = self.empty_files = 0
        self._bad = bad
        for document in self._documents():
            if document.text.strip():
                yield document
            else:
                self.empty += 1

    def _documents(self) -> Iterator[Document]:
        for record in self._records():
            document, problem = None, record.problem
            if record.value is not None:
                document, problem = self._read(record.value)
            if document is not None:
                yield document
            elif self._bad is None:
                raise DataError(f"{record.place} {problem}.")
            else:
                self._bad.append(BadRecord(record.place, record.number, problem))

    def _records(self) -> Iterator[Record]:
        source = self.source
        if not source.paths:
            yield from read_dataset(source)
        for number, piece in enumerate(self.pieces):
            is_empty_file = piece.is_whole
            try:
                for record in read_records(source, piece, number):
                    is_empty_file = False
                    yield record
            except OSError as error:
                raise DataError(f"cannot read {piece.path}: {error.strerror or error}.") from error
            self.empty_files += is_empty_file

    def _read(self, record: dict[str, Any]) -> tuple[Document | None, str]:
        """(document, "") of a good record, or (None, what is wrong with it)."""
        source = self.source
        content, missing = field_of(record, source.field)
        if missing:
            return None, f"has {with_remedy(source, missing)}"
        is_chat = source.content == "conversation"
        wanted_keys = [source.field, source.effort_field] if is_chat else [source.field]
        if (key := repeated_key(record, wanted_keys)) is not None:
            return None, f"has the key {key!r} twice, and either value could be meant"
        if not isinstance(content, (str, list) if is_chat else str):
            wanted = "a list of messages" if is_chat else "a string"
            field = f"in the field {source.field!r}"
            return None, f"has {name_of(content)} instead of {wanted} {field}"
        if is_chat:
            try:
                conversation = read_messages(content, field_of(record, source.effort_field)[0])
            except DataError as error:
                return None, str(error)
            if not conversation.is_answered:
                return None, "has no answer after its last message, so that nothing is learned"
            segments = render(conversation, self.prompts)
            document = Document("".join(segments), tuple(segments))
        else:
            document = Document(str(content))
        problem = _unusable(document.text)
        return None if problem else document, problem


def _unusable(text: str) -> str:
    """What is wrong with a text; "" where nothing is."""
    if len(text) > _MAX_CHARACTERS:
        return f"has {len(text)} characters; a document may have {_MAX_CHARACTERS}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, "
            "which is not valid Unicode text"
        )
    return ""


def no_document(
    source: SourceConfig, files: int, empty: int, empty_files: int = 0, dropped: int = 0
) -> DataError:
    """The error for a source without any document, `dropped` of which the filters removed."""
    unread = f" ({empty_files} of them without a record)" if empty_files else ""
    filters = f", {dropped} dropped by the filters" if dropped else ""
    return DataError(
        f"source {source.name!r} holds no document: {files} files{unread}, {empty} empty documents"
        f"{filters}."
    )


def require_few_bad(
    source: SourceConfig, bad: int, records: int, max_fraction: float, listing: str
) -> None:
    """Raises DataError where more of a source's records are bad than `max_fraction`.

    `listing` says where they are listed.
    """
    fraction = bad / max(1, records)
    if fraction > max_fraction:
        raise DataError(
            f"source {source.name!r} has {bad} bad records, a fraction of {fraction:.3g}; "
            f"`max_bad_record_fraction` is {max_fraction:g} ({listing})."
        )


def require_distinct(corpora: Iterable[Corpus]) -> None:
    """Raises DataError where two sources read the same field of the same file or hub dataset."""
    readers: dict[tuple[object, ...], str] = {}
    for corpus in corpora:
        source = corpus.source
        origins: dict[object, object] = {identity(file.path): file.path for file in corpus.files}
        if source.dataset is not None:
            subset = (source.dataset_subset, source.dataset_split, source.dataset_revision)
            origins = {(source.dataset, *subset): source.dataset}
        for origin, name in origins.items():
            other = readers.setdefault((origin, source.format, source.field), source.name)
            if other != source.name:
                raise DataError(
                    f"sources {other!r} and {source.name!r} both read {name}, so that its text "
                    "would be there twice; name it in one of them, and set its share in "
                    "data.source_weights."
                )
