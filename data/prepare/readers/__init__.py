"""Readers of files, one for each format: what their records are, and how they are divided."""

from collections.abc import Iterator

from data.config import SourceConfig
from data.errors import DataError
from data.prepare.pieces import Piece
from data.prepare.readers import json_text, lines, parquet, text, warc
from data.prepare.readers.compressed import SUFFIXES
from data.prepare.readers.hub import read_dataset
from data.prepare.readers.record import Record, field_of, name_of, repeated_key, with_remedy

__all__ = [
    "SUFFIXES",
    "Record",
    "divide",
    "field_of",
    "name_of",
    "read_dataset",
    "read_records",
    "repeated_key",
    "with_remedy",
]

_READERS = {"json": json_text, "lines": lines, "parquet": parquet, "warc": warc, "wet": warc}


def read_records(source: SourceConfig, piece: Piece, number: int) -> Iterator[Record]:
    """The records of a piece, which is the source's piece `number`."""
    if source.format == "text":
        return iter([text.read(source, piece, number)])
    return _READERS[source.format].read(source, piece)


def divide(source: SourceConfig, file: Piece, part_bytes: int) -> list[Piece] | str:
    """Pieces of a file of about `part_bytes`, or why it cannot be divided.

    Arguments:
        file: the whole file, of at least twice `part_bytes`.

    What cannot be read at all is left to the reader, whose error has the place.
    """
    if source.format == "text":
        return "is a document of `format: text`"
    try:
        return _READERS[source.format].divide(source, file, part_bytes)
    except DataError:
        return [file]
