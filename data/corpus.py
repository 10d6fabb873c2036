"""Raw text through the `datasets` library, with errors that name the file and the place."""

import glob
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.config import SourceConfig
from data.errors import DataError

_READ_BYTES = 1 << 20


class Corpus:
    """The documents of one source, in a fixed order; read as a stream, nothing is cached.

    In `format: text` the ends of lines become "\\n"; the other formats keep every character.

    Attributes:
        source: its configuration.
        files: the local files, sorted; empty for a hub dataset.
        empty: documents skipped by the last iteration because they hold no visible character.

    Raises DataError for a path that matches nothing, text that is not UTF-8, a record without
    the text field, and a source without any document.
    """

    def __init__(self, source: SourceConfig) -> None:
        self.source = source
        self.files = _find_files(source) if source.paths else []
        self.empty = 0

    def __iter__(self) -> Iterator[str]:
        self.empty = 0
        found = 0
        for text in self._texts():
            if text.strip():
                found += 1
                yield text
            else:
                self.empty += 1
        if not found:
            raise DataError(
                f"source {self.source.name!r} holds no document: "
                f"{len(self.files)} files, {self.empty} empty documents."
            )

    def _texts(self) -> Iterator[str]:
        if not self.source.paths:
            yield from self._records(self._open_hub(), self.source.dataset or "", 0)
        elif self.source.format == "text":
            # One stream for all files: a tree of code has thousands of small ones.
            files = [file for file in self.files if os.path.getsize(file)]
            self.empty += len(self.files) - len(files)
            if files:
                options = {"sample_by": "document", "keep_linebreaks": True}
                yield from self._records(self._open(files, options), "its files", 0)
        else:
            for file in self.files:
                if os.path.getsize(file):
                    yield from self._records(self._open([file], {}), str(file), 1)

    def _open(self, files: list[Path], options: dict[str, Any]) -> Any:
        import datasets

        # The library logs what it also raises, and we report what it raises.
        datasets.utils.logging.set_verbosity(logging.CRITICAL)
        builder = self.source.format
        names = [glob.escape(str(file)) for file in files]
        return datasets.load_dataset(
            builder, data_files=names, split="train", streaming=True, **options
        )

    def _open_hub(self) -> Any:
        import datasets

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

    def _records(self, stream: Any, place: str, first: int) -> Iterator[str]:
        """The text field of each record; `place` and the record's number go into errors."""
        field = "text" if self.source.format == "text" else self.source.text_field
        records = iter(stream)
        number = first
        while True:
            try:
                record = next(records)
            except StopIteration:
                return
            except Exception as error:  # pyarrow, json, gzip, zstd and datasets each have their own
                raise self._broken(place, number, error) from error
            text = record.get(field)
            if not isinstance(text, str):
                raise DataError(
                    f"record {number} of {place} has no string in the field {field!r}; its fields "
                    f"are {', '.join(sorted(record))} (set `text_field` of source "
                    f"{self.source.name!r})."
                )
            yield text
            number += 1

    def _broken(self, place: str, number: int, error: Exception) -> DataError:
        """Look for bytes that are not UTF-8 first; they hide behind many kinds of errors."""
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

    if path.suffix in (".gz", ".zst", ".xz", ".bz2", ".zip"):
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


def _find_files(source: SourceConfig) -> list[Path]:
    found: set[Path] = set()
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
        found.update(matches)
    return sorted(found)


def _one_line(error: BaseException) -> str:
    """The innermost cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())
