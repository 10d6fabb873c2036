"""Files that are documents."""

from data.config import SourceConfig
from data.prepare.pieces import Piece
from data.prepare.readers.record import Record
from data.prepare.readers.streams import UNPACK, PieceStream, is_archive, is_empty, problem_of


def read(source: SourceConfig, piece: Piece, number: int) -> Record:
    """A file as one record with its whole text, in which line ends are "\\n"."""
    file = piece.path
    if is_empty(piece):
        return Record(str(file), number, {source.field: ""})
    if is_archive(file):
        return Record(str(file), number, None, UNPACK)
    with PieceStream(piece) as stream:
        content = stream.read()
    if problem := problem_of(content, source):
        return Record(str(file), number, None, problem)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        return Record(str(file), number, None, f"is not UTF-8 at byte {error.start}")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return Record(str(file), number, {source.field: text})
