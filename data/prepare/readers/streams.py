"""The bytes and the lines of pieces of files, decompressed where the name ends in a compression's.

A line belongs to the piece that has the line end in front of it, or the beginning of the file. So
every line is in one piece, which is read beyond its end where the last line continues there.
"""

import io
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, cast

from data.config import SourceConfig
from data.errors import DataError
from data.prepare.pieces import Piece
from data.prepare.readers.compressed import (
    SUFFIXES,
    DecompressedFile,
    compression_of,
    form_of,
    suffix_of,
)
from data.prepare.readers.frames import frame_starts
from data.prepare.readers.record import is_table
from data.storage import AnyPath, RangeReader, StoragePath

BOM = b"\xef\xbb\xbf"
UNPACK = "is an archive; unpack it and name the folder"
PARQUET = b"PAR1"
"""The first bytes of a table."""
_ZIP = b"PK\x03\x04"
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
_BUFFER_BYTES = 1 << 16
_SKIP_BYTES = 1 << 20  # of another piece's line that are in memory


def open_stored(piece: Piece) -> BinaryIO:
    """The bytes of a piece's file, all of them, as they are stored."""
    if isinstance(piece.path, StoragePath):
        reader = RangeReader(piece.path, piece.size if piece.is_whole else None)
        return cast(BinaryIO, io.BufferedReader(reader, _BUFFER_BYTES))
    stream: BinaryIO = piece.path.open("rb")
    return stream


class PieceStream(AbstractContextManager["PieceStream"]):
    """The decompressed bytes of a piece, closed at the end of a `with` statement."""

    def __init__(self, piece: Piece) -> None:
        self._piece = piece
        self._stream = open_stored(piece)
        self._stream.seek(piece.start)
        self._frames: DecompressedFile | None = None
        if (form := form_of(piece.path)) is not None:
            self._frames = DecompressedFile(self._stream, form, piece.start, piece.stop)
            self._stream = cast(BinaryIO, io.BufferedReader(self._frames, _BUFFER_BYTES))

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    @property
    def stream(self) -> BinaryIO:
        """The bytes as an open file."""
        return self._stream

    def read(self) -> bytes:
        """The bytes from here to the end of the file."""
        return self._stream.read()

    def first_line(self, limit: int) -> bytes:
        """The first line, or its first `limit` bytes."""
        return self._stream.readline(limit)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yields the lines of the piece with their numbers, counted from where it starts.

        Line 1 of a piece that is not the first of its file belongs to the one before.
        """
        position, number = 0, 1
        if self._piece.start:
            part = b""
            while not part.endswith(b"\n"):
                part = self._stream.readline(_SKIP_BYTES)
                position += len(part)
                if not part or self._is_beyond(position):
                    return
            number = 2
        while not self._is_beyond(position) and (line := self._stream.readline()):
            position += len(line)
            yield number, line
            number += 1

    def _is_beyond(self, position: int) -> bool:
        """Whether the piece ends before the byte in front of `position`."""
        if self._piece.stop is None:
            return False
        if self._frames is not None:
            return self._frames.end is not None and position > self._frames.end
        return position > self._piece.stop - self._piece.start


def place_of(piece: Piece, number: int) -> str:
    """Where a line is, for errors: as it is counted from the piece's first byte."""
    if not piece.start:
        return f"line {number} of {piece.path}"
    unit = "compressed byte" if form_of(piece.path) else "byte"
    return f"line {number} after {unit} {piece.start:,} of {piece.path}"


def divide_lines(file: Piece, part_bytes: int) -> list[Piece] | str:
    """Pieces of lines of about `part_bytes`, or why a file cannot be divided."""
    count = file.size // part_bytes
    cuts = [file.size * i // count for i in range(1, count)]
    if (form := form_of(file.path)) is not None:
        with open_stored(file) as stream:
            is_local = not isinstance(file.path, StoragePath)
            cuts = frame_starts(stream, form, cuts, file.size, is_local)
        if not cuts:
            return f"is one stream of {form}"
    places = [0, *cuts, file.size]
    return [
        Piece(path=file.path, size=stop - start, start=start, stop=stop)
        for start, stop in pairwise(places)
    ]


def problem_of(content: bytes, source: SourceConfig) -> str:
    """What is wrong with a file that its name does not show to be packed, or a table."""
    if content.startswith(PARQUET):
        return is_table(source)
    if content.startswith(_ZIP):
        return UNPACK
    form = compression_of(content)
    return f"is compressed by {form}; let its name end in {suffix_of(form)}" if form else ""


def require_text(piece: Piece, first_line: bytes, source: SourceConfig) -> None:
    """Raises DataError for a file that holds an unknown number of lines."""
    if problem := problem_of(first_line, source):
        raise DataError(f"{piece.path} {problem}.")


def require_no_archive(file: AnyPath) -> None:
    """Raises DataError for a file that its name shows to be an archive."""
    if is_archive(file):
        raise DataError(f"{file} {UNPACK}.")


def is_archive(file: AnyPath) -> bool:
    """Whether a file's name shows it to be an archive."""
    inner = Path(file.name.removesuffix(file.suffix)).suffix if file.suffix in SUFFIXES else ""
    return file.suffix in _ARCHIVES or inner == ".tar"


def is_empty(file: Piece) -> bool:
    """True for files of plain text without a byte; others of no size are cut off."""
    return not file.size and file.path.suffix not in SUFFIXES
