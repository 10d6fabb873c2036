"""JSON: an object a line, a list of all, or one object after another.

Files are read here rather than by `datasets`, whose tables need one type for every field of all
records: there a field that appears late, changes its type or looks like a date fails, though nobody
asked for it. A JSON line that cannot be read is one bad record.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from data.config import SourceConfig
from data.errors import DataError
from data.prepare.pieces import Piece
from data.prepare.readers.record import Record, field_of, json_object, name_of, set_format
from data.prepare.readers.streams import (
    BOM,
    PieceStream,
    divide_lines,
    is_empty,
    place_of,
    require_no_archive,
    require_text,
)
from data.storage import AnyPath

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(object_pairs_hook=json_object)
# Only strings are wanted; an integer of any length is a float.
_TEXT_DECODER = json.JSONDecoder(parse_int=float, object_pairs_hook=json_object)


def read(source: SourceConfig, piece: Piece) -> Iterator[Record]:
    """The objects of a file: one a line, or a list of all, or one after another.

    Raises DataError for what holds an unknown number of records: a file that is compressed or
    packed under another name, a list of objects in place of one, and an object with a list of them.
    """
    require_no_archive(piece.path)
    if is_empty(piece):
        return
    for record in _records(source, piece):
        if record.number == 1:
            _require_one_record(source, record)
        yield record


def divide(source: SourceConfig, file: Piece, part_bytes: int) -> list[Piece] | str:
    """Pieces of lines of about `part_bytes`, or why a file cannot be divided."""
    with PieceStream(file) as stream:
        line = stream.first_line(part_bytes)
    if _is_one_text(line):
        return "is JSON that is not one object a line"
    if not line.endswith(b"\n"):
        return f"has a first line of more than {part_bytes:,} bytes"
    return divide_lines(file, part_bytes)


def _is_one_text(first_line: bytes) -> bool:
    """Whether a file is one list, or objects over several lines."""
    opening = first_line.removeprefix(BOM).strip()
    return opening == b"{" or opening.startswith(b"[")


def _records(source: SourceConfig, piece: Piece) -> Iterator[Record]:
    decoder = _TEXT_DECODER if source.content == "text" else _DECODER
    with PieceStream(piece) as stream:
        for number, line in stream.lines():
            if number == 1:
                line = line.removeprefix(BOM)
                require_text(piece, line, source)
                if _is_one_text(line):
                    yield from _whole_text(piece.path, line + stream.read(), decoder)
                    return
            place = place_of(piece, number)
            values, problem = _read_line(line, decoder)
            del line  # one of hundreds of megabytes is not kept with its document
            if problem and number == 1:
                problem += f"; {set_format(source, 'text')} where a file is a document"
            if problem:
                yield Record(place, number, None, problem)
            while values:
                yield _object(place, number, values.pop(0))


def _require_one_record(source: SourceConfig, record: Record) -> None:
    """Raises DataError where the first record of a file has several records under a key.

    It is a document for none of them, and how many they are is unknown.
    """
    field = source.field
    if record.value is None or not field_of(record.value, field)[1]:
        return
    for key, value in record.value.items():
        inner = [value, *value.values()] if isinstance(value, dict) else value
        is_list = isinstance(inner, list)
        if is_list and any(isinstance(o, dict) and not field_of(o, field)[1] for o in inner):
            raise DataError(
                f"{record.place} is no record: it has records in {key!r}; write each of them on a "
                "line of its own."
            )


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


def _whole_text(file: AnyPath, content: bytes, decoder: json.JSONDecoder) -> Iterator[Record]:
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
