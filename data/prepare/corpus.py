"""Raw text read by the `datasets` library, with errors that name the file and the record."""

import glob
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data.config import SourceConfig
from data.errors import DataError
from data.prepare.compressed import SUFFIXES, register_formats
from data.text import OWN_PROMPTS, Special, read_messages, read_prompts, render

_READ_BYTES = 1 << 20
_MAX_CHARACTERS = 10**9


class BadRecord(NamedTuple):
    """A record that is not a document: its file(s) or dataset, its number there, and the reason."""

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
        files: read these files of the source only; by default, all that its paths match.

    Attributes:
        files: the local files, sorted; empty for a hub dataset.
        prompts: the prompt texts of conversations.
        empty: documents skipped by the last iteration because they have no visible character.

    Raises DataError for a path that matches nothing, text that is not UTF-8, a compressed file that
    is cut off, a record without the text field or longer than 10^9 characters, and a source without
    any document.
    """

    def __init__(self, source: SourceConfig, files: Sequence[Path] | None = None) -> None:
        self.source = source
        self.files = list(files) if files is not None else find_files(source)
        file = source.prompts_file
        self.prompts = OWN_PROMPTS if file is None else read_prompts(file)
        self.empty = 0
        self._bad: list[BadRecord] | None = None

    def __iter__(self) -> Iterator[Document]:
        count = 0
        for document in self.documents():
            count += 1
            yield document
        if not count:
            raise no_document(self.source, len(self.files), self.empty)

    def documents(self, bad: list[BadRecord] | None = None) -> Iterator[Document]:
        """Yields the documents, if any; bad records are appended to `bad`, or raise without it."""
        self.empty = 0
        self._bad = bad
        for document in self._documents():
            if document.text.strip():
                yield document
            else:
                self.empty += 1

    def _documents(self) -> Iterator[Document]:
        if not self.source.paths:
            yield from self._records(self._open_hub, self.source.dataset or "", 0)
        elif self.source.format == "text":
            # One stream for all files: a tree of code has thousands of small ones.
            files = [file for file in self.files if not _is_empty(file)]
            self.empty += len(self.files) - len(files)
            if self._bad is not None:
                files = self._decodable(files, self._bad)
            if files:
                opened = partial(self._open, files, {"sample_by": "document"})
                place = f"the files of source {self.source.name!r}"
                yield from self._records(opened, place, 0)
        else:
            for file in self.files:
                if not _is_empty(file):
                    yield from self._records(partial(self._open_one, file), str(file), 1)

    def _decodable(self, files: list[Path], bad: list[BadRecord]) -> list[Path]:
        """The files that are UTF-8; each of the others is a bad record."""
        good = []
        for number, file in enumerate(files):
            offset = first_invalid_utf8(file)
            if offset is None:
                good.append(file)
            else:
                bad.append(BadRecord(str(file), number, f"is not UTF-8 at byte {offset}"))
        return good

    def _open_one(self, file: Path) -> Any:
        if self.source.content == "text" or self.source.format == "parquet":
            return self._open([file], {})
        # Lines of JSON, since Arrow would give every tool call the arguments of all the others.
        lines = self._open([file], {"sample_by": "line"}, "text")
        return (_json_record(line) for line in lines if line["text"].strip())

    def _open(self, files: list[Path], options: dict[str, Any], builder: str = "") -> Any:
        import datasets

        # The library also logs what it raises, which is reported once.
        datasets.utils.logging.set_verbosity(logging.CRITICAL)
        register_formats()
        builder = builder or self.source.format
        names = [glob.escape(str(file)) for file in files]
        return datasets.load_dataset(
            builder, data_files=names, split="train", streaming=True, **options
        )

    def _open_hub(self) -> Any:
        import datasets

        register_formats()
        source = self.source
        try:
            return datasets.load_dataset(
                source.dataset,
                source.dataset_subset,
                split=source.dataset_split,
                revision=source.dataset_revision,
                streaming=True,
            )
        except Exception as error:  # hub, network and builder errors share no base class
            raise DataError(
                f"source {source.name!r}: cannot open the dataset {source.dataset!r}: "
                f"{_one_line(error)}"
            ) from error

    def _records(self, opened: Callable[[], Any], place: str, first: int) -> Iterator[Document]:
        """Yields the document of each record; errors name `place` and the number of the record.

        `opened` may fail as reading does, since `datasets` already reads the beginning of
        compressed files in it.
        """
        field = "text" if self.source.format == "text" else self.source.field
        records: Iterator[Any] | None = None
        number = first
        while True:
            try:
                records = iter(opened()) if records is None else records
                record = next(records)
            except StopIteration:
                return
            except DataError:
                raise
            except Exception as error:  # pyarrow, json, gzip, zstd and datasets each have their own
                raise self._broken(place, number, error) from error
            document, reason = self._read(record, field)
            if document is not None:
                yield document
            elif self._bad is None:
                raise DataError(f"record {number} of {place} {reason}.")
            else:
                self._bad.append(BadRecord(place, number, reason))
            number += 1

    def _read(self, record: dict[str, Any], field: str) -> tuple[Document | None, str]:
        """(document, "") of a good record, or (None, what is wrong with it)."""
        content = record.get(field)
        is_chat = self.source.content == "conversation"
        if not isinstance(content, (str, list) if is_chat else str):
            kind = "list of messages" if is_chat else "string"
            setting = "messages_field" if is_chat else "text_field"
            return None, (
                f"has no {kind} in the field {field!r}; its fields are "
                f"{', '.join(sorted(record))} (set `{setting}` of source {self.source.name!r})"
            )
        if is_chat:
            try:
                conversation = read_messages(content, record.get(self.source.effort_field))
            except DataError as error:
                return None, str(error)
            if not conversation.is_answered:
                return None, "has no answer after its last message, so that nothing is learned"
            segments = render(conversation, self.prompts)
            document = Document("".join(segments), tuple(segments))
        else:
            document = Document(str(content))
        size = len(document.text)
        if size > _MAX_CHARACTERS:
            return None, f"has {size} characters; a document may have {_MAX_CHARACTERS}"
        return document, ""

    def _broken(self, place: str, number: int, error: Exception) -> DataError:
        """The error for a record that cannot be read; bytes that are not UTF-8 cause many kinds."""
        if self.source.format != "parquet":
            for file in self.files:
                offset = first_invalid_utf8(file)
                if offset is not None:
                    return DataError(
                        f"{file} is not UTF-8: the byte at offset {offset} is invalid."
                    )
        return DataError(f"cannot read record {number} of {place}: {_one_line(error)}")


def first_invalid_utf8(path: Path) -> int | None:
    """Byte offset of the first byte that is not UTF-8, None for a good (or compressed) file."""
    import codecs

    if path.suffix in (*SUFFIXES, ".zip"):
        return None
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    with path.open("rb") as stream:
        while True:
            block = stream.read(_READ_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return position - pending + error.start
            if not block:
                return None
            position += len(block)


def _is_empty(file: Path) -> bool:
    """True for files of plain text without a byte; others of no size are cut off."""
    return not os.path.getsize(file) and file.suffix not in (*SUFFIXES, ".zip", ".parquet")


def no_document(source: SourceConfig, files: int, empty: int, dropped: int = 0) -> DataError:
    """The error for a source without any document, `dropped` of which the filters removed."""
    filters = f", {dropped} dropped by the filters" if dropped else ""
    return DataError(
        f"source {source.name!r} holds no document: {files} files, {empty} empty documents"
        f"{filters}."
    )


def find_files(source: SourceConfig) -> list[Path]:
    """The local files of a source, sorted; DataError for a path that matches nothing."""
    files: set[Path] = set()
    for pattern in source.paths:
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = [p for include in source.include for p in path.glob(include) if p.is_file()]
        elif path.is_file():
            matches = [path]
        else:
            names = glob.glob(str(path), recursive=True)
            matches = [p for p in map(Path, names) if p.is_file()]
        if not matches:
            raise DataError(
                f"source {source.name!r}: nothing to read at {pattern} "
                f"({'an empty folder' if path.is_dir() else 'no such file, folder or match'})."
            )
        files.update(matches)
    return sorted(files)


def _json_record(line: dict[str, str]) -> dict[str, Any]:
    """The object on a line of JSON."""
    record = json.loads(line["text"])
    if not isinstance(record, dict):
        raise ValueError(f"the line is a {type(record).__name__} instead of an object")
    return record


def _one_line(error: BaseException) -> str:
    """The innermost cause, or the first that has a sentence of ours, on one line."""
    while error.__cause__ is not None and not isinstance(error, DataError):
        error = error.__cause__
    if isinstance(error, DataError):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())
