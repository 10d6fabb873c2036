"""Lines that are documents."""

from collections.abc import Iterator

from data.config import SourceConfig
from data.prepare.pieces import Piece
from data.prepare.readers.record import Record
from data.prepare.readers.streams import (
    BOM,
    PieceStream,
    divide_lines,
    is_empty,
    place_of,
    require_no_archive,
    require_text,
)


def read(source: SourceConfig, piece: Piece) -> Iterator[Record]:
    """The lines of a file without their line ends, "\\n" or "\\r\\n"."""
    require_no_archive(piece.path)
    if is_empty(piece):
        return
    with PieceStream(piece) as stream:
        for number, line in stream.lines():
            if number == 1:
                line = line.removeprefix(BOM)
                require_text(piece, line, source)
            line = line.removesuffix(b"\n").removesuffix(b"\r")
            place = place_of(piece, number)
            try:
                yield Record(place, number, {source.field: line.decode()})
            except UnicodeDecodeError as error:
                yield Record(place, number, None, f"is not UTF-8 at byte {error.start}")


def divide(source: SourceConfig, file: Piece, part_bytes: int) -> list[Piece] | str:
    """Pieces of lines of about `part_bytes`, or why a file cannot be divided."""
    return divide_lines(file, part_bytes)
