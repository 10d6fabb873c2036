"""The records of local files and of datasets of the hub, before their text is taken out.

Local files are read here rather than by `datasets`, whose tables need one type for every field of
all records: there a field that appears late, changes its type or looks like a date fails, though
nobody asked for it. A JSON line that cannot be read is one bad record.
"""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data.config import SourceConfig
from data.errors import DataError
from data.prepare.compressed import SUFFIXES, compression_of, register_formats, suffix_of

_BOM = b"\xef\xbb\xbf"
_PARQUET = b"PAR1"
_ZIP = b"PK\x03\x04"
_ROWS = 256  # of a table that are decoded together
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
_UNPACK = "is an archive; unpack it and name the folder"
_SPACE = re.compile(r"[ \t\r\n]*")


class RepeatedKeys(dict[str, Any]):
    """A JSON object that has a key twice: readers differ in which of the values they take.

    Attributes:
        names: the keys.
    """

    names: tuple[str, ...] = ()


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values."""
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    repeated = RepeatedKeys(value)
    repeated.names = tuple(n for n, count in Counter(n for n, _ in pairs).items() if count > 1)
    return repeated


_DECODER = json.JSONDecoder(object_pairs_hook=_json_object)
# Only strings are wanted; an integer of any length is a float.
_TEXT_DECODER = json.JSONDecoder(parse_int=float, object_pairs_hook=_json_object)


class Record(NamedTuple):
    """One record.

    Attributes:
        place: where it is, for errors: a line of a file, a row of a table, a file.
        number: the number of the line, row or file in it.
        value: the object; None where there is a problem.
        problem: why it cannot be read.
    """

    place: str
    number: int
    value: dict[str, Any] | None
    problem: str = ""


def read_json(source: SourceConfig, file: Path) -> Iterator[Record]:
    """The objects of a file: one a line, or a list of all, or one after another.

    Raises DataError for what holds an unknown number of records: a file that is compressed or
    packed under another name, and a list of objects in place of one.
    """
    decoder = _TEXT_DECODER if source.content == "text" else _DECODER
    if _is_archive(file):
        raise DataError(f"{file} {_UNPACK}.")
    number = 0
    with open_file(file) as stream:
        for line in stream:
            number += 1
            if number == 1:
                line = line.removeprefix(_BOM)
                if line.startswith(_PARQUET):
                    raise DataError(f"{file} {_is_table(source)}.")
                if problem := _is_packed(line):
                    raise DataError(f"{file} {problem}.")
                opening = line.strip()
                if opening == b"{" or opening.startswith(b"["):
                    yield from _whole_json(file, line + stream.read(), decoder)
                    return
            place = f"line {number} of {file}"
            values, problem = _read_line(line, decoder)
            del line  # one of hundreds of megabytes is not kept with its document
            if problem and number == 1:
                problem += f"; {_set_format(source, 'text')} where a file is a document"
            if problem:
                yield Record(place, number, None, problem)
            while values:
                yield _object(place, number, values.pop(0))


def _read_line(line: bytes, decoder: json.JSONDecoder) -> tuple[list[Any], str]:
    """The values of a line, usually one, or what is wrong with it."""
    try:
        return _values(line.decode(), decoder), ""
    except UnicodeDecodeError as error:
        return [], f"is not UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        return [], f"is not JSON ({error.msg} at character {error.pos})"
    except (ValueError, RecursionError) as error:  # a number, or nesting, beyond Python's limits
        return [], f"is not JSON that can be read ({error})"


def _whole_json(file: Path, content: bytes, decoder: json.JSONDecoder) -> Iterator[Record]:
    """The objects of JSON that is one list, or objects over several lines."""
    try:
        values = _values(content.decode(), decoder)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file} is neither a list of objects in JSON nor one object a line: {error}."
        ) from error
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    for number, value in enumerate(values, 1):
        yield _object(f"record {number} of {file}", number, value)


def _values(text: str, decoder: json.JSONDecoder) -> list[Any]:
    """The JSON values of a text, which only white space separates."""
    values = []
    position = _first_character(text, 0)
    while position < len(text):
        value, position = decoder.raw_decode(text, position)
        values.append(value)
        position = _first_character(text, position)
    return values


def _first_character(text: str, position: int) -> int:
    """The place of the first character from `position` on that is no white space of JSON."""
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _object(place: str, number: int, value: Any) -> Record:
    if isinstance(value, dict):
        return Record(place, number, value)
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        raise DataError(
            f"{place} is a list of records instead of one; a file should have one object a line, "
            "or be one list of objects."
        )
    return Record(place, number, None, f"is {name_of(value)} instead of an object")


def name_of(value: Any) -> str:
    """What JSON calls a value."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {str: "a string", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def repeated_key(record: dict[str, Any], wanted: Sequence[str]) -> str | None:
    """A wanted key that a record has twice, or any key that is twice inside a wanted value."""
    for name in getattr(record, "names", ()):
        if name in wanted:
            return str(name)
    values = [record[name] for name in wanted if name in record]
    while values:
        value = values.pop()
        if isinstance(value, RepeatedKeys):
            return value.names[0]
        if isinstance(value, dict | list):
            values += value.values() if isinstance(value, dict) else value
    return None


def read_parquet(source: SourceConfig, file: Path) -> Iterator[Record]:
    """The rows of a table, with the columns that are wanted."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if source.field not in names:
                raise DataError(f"{file} has {no_field(source, names)}.")
            for name in (source.field, source.effort_field):
                if names.count(name) > 1:
                    raise DataError(f"{file} has {names.count(name)} columns {name!r}.")
            wanted = [source.field]
            if source.content == "conversation" and source.effort_field in names:
                wanted.append(source.effort_field)
            number = 0
            for batch in table.iter_batches(_ROWS, columns=wanted):
                for row in zip(*map(_strings, batch.columns), strict=True):
                    number += 1
                    values = dict(zip(wanted, row, strict=True))
                    yield _row(f"row {number} of {file}", number, values)
    except (pyarrow.ArrowException, OSError) as error:
        with file.open("rb") as stream:
            start = stream.read(len(_PARQUET))
        if start != _PARQUET:
            remedy = _set_format(source, "json` or `format: text")
            raise DataError(f"{file} is not a parquet table; {remedy}.") from error
        raise DataError(
            f"{file} is a damaged parquet table: {' '.join(str(error).split())}"
        ) from error


def _strings(column: Any) -> list[Any]:
    """The values of a column; bytes that are not UTF-8 stay a UnicodeDecodeError."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_string(value) for value in column]


def _string(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error


def _row(place: str, number: int, values: dict[str, Any]) -> Record:
    for name, value in values.items():
        if isinstance(value, UnicodeDecodeError):
            problem = f"is not UTF-8 at byte {value.start} of the field {name!r}"
            return Record(place, number, None, problem)
    return Record(place, number, values)


def read_text(source: SourceConfig, file: Path, number: int) -> Record:
    """A file as one record with its whole text, in which line ends are "\\n"."""
    if _is_archive(file):
        return Record(str(file), number, None, _UNPACK)
    with open_file(file) as stream:
        content = stream.read()
    if content.startswith(_PARQUET):
        return Record(str(file), number, None, _is_table(source))
    if problem := _is_packed(content):
        return Record(str(file), number, None, problem)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        return Record(str(file), number, None, f"is not UTF-8 at byte {error.start}")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return Record(str(file), number, {source.field: text})


def read_hub(source: SourceConfig) -> Iterator[Record]:
    """The records of a dataset of the Hugging Face hub, streamed by `datasets`."""
    import datasets

    # The library also logs what it raises, which is reported once.
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    register_formats()
    try:
        records = datasets.load_dataset(
            source.dataset,
            source.dataset_subset,
            split=source.dataset_split,
            revision=source.dataset_revision,
            streaming=True,
        )
    except DataError:
        raise
    except Exception as error:  # hub, network and builder errors share no base class
        raise DataError(
            f"source {source.name!r}: cannot open the dataset {source.dataset!r}: "
            f"{_one_line(error)}"
        ) from error
    iterator = iter(records)
    number = 0
    while True:
        place = f"record {number} of {source.dataset}"
        try:
            value = next(iterator)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:  # pyarrow, json, gzip and datasets each have their own
            raise DataError(f"cannot read {place}: {_one_line(error)}") from error
        yield Record(place, number, value)
        number += 1


def open_file(file: Path) -> BinaryIO:
    """The bytes of a file, decompressed where its suffix names a compression."""
    from fsspec.implementations.local import LocalFileSystem

    if file.suffix not in SUFFIXES:
        return file.open("rb")
    register_formats()
    stream: BinaryIO = LocalFileSystem().open(str(file), "rb", compression="infer")
    return stream


def _is_packed(content: bytes) -> str:
    """What is wrong with a file that its name does not show to be compressed or an archive."""
    if content.startswith(_ZIP):
        return _UNPACK
    form = compression_of(content)
    return f"is compressed by {form}; let its name end in {suffix_of(form)}" if form else ""


def _is_archive(file: Path) -> bool:
    inner = Path(file.stem).suffix if file.suffix in SUFFIXES else ""
    return file.suffix in _ARCHIVES or inner == ".tar"


def is_empty(file: Path) -> bool:
    """True for files of plain text without a byte; others of no size are cut off."""
    return not os.path.getsize(file) and file.suffix not in (*SUFFIXES, ".parquet")


def no_field(source: SourceConfig, names: list[str]) -> str:
    """What is wrong with a record that lacks the source's field."""
    setting = "messages_field" if source.content == "conversation" else "text_field"
    return (
        f"no field {source.field!r}; its fields are {', '.join(sorted(names)) or 'none'} "
        f"(set `{setting}` of source {source.name!r})"
    )


def _is_table(source: SourceConfig) -> str:
    return f"is a parquet table; {_set_format(source, 'parquet')}"


def _set_format(source: SourceConfig, form: str) -> str:
    return f"set `format: {form}` of source {source.name!r}"


def _one_line(error: BaseException) -> str:
    """The innermost cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())
