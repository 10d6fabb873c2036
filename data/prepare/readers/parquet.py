"""The rows of tables, whose row groups are read on their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from data.config import SourceConfig
from data.errors import DataError
from data.prepare.pieces import Piece
from data.prepare.readers.record import Record, field_of, set_format, with_remedy
from data.prepare.readers.streams import PARQUET, open_stored

_ROWS = 256  # that are decoded together


def read(source: SourceConfig, piece: Piece) -> Iterator[Record]:
    """The rows of a table, with the columns that are wanted."""
    file = piece.path
    with _open_table(source, piece) as table:
        names = table.schema_arrow.names
        fields = _fields(table.schema_arrow)
        if missing := field_of(fields, source.field)[1]:
            raise DataError(f"{file} has {with_remedy(source, missing)}.")
        wanted = [source.field]
        if source.content == "conversation" and not field_of(fields, source.effort_field)[1]:
            wanted.append(source.effort_field)
        columns = list(dict.fromkeys(n if n in names else n.partition(".")[0] for n in wanted))
        for name in columns:
            if names.count(name) > 1:
                raise DataError(f"{file} has {names.count(name)} columns {name!r}.")
        stop = table.num_row_groups if piece.stop is None else piece.stop
        number = sum(table.metadata.row_group(group).num_rows for group in range(piece.start))
        for group in range(piece.start, stop):  # one after another, which bounds the memory
            # Of a column with fields, only those wanted are read; `a.b` may also be a column a.
            for batch in table.iter_batches(_ROWS, row_groups=[group], columns=wanted):
                for row in zip(*(_strings(batch.column(name)) for name in columns), strict=True):
                    number += 1
                    values = dict(zip(columns, row, strict=True))
                    yield _row(f"row {number} of {file}", number, values)


def divide(source: SourceConfig, file: Piece, part_bytes: int) -> list[Piece] | str:
    """Row groups of about `part_bytes` together, or why a table cannot be divided."""
    with _open_table(source, file) as table:
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
    if len(groups) < 2:
        return "is a table of one row group"
    # The stored sizes of a table's columns are many; those before compression have a sum.
    scale = file.size / max(1, sum(group.total_byte_size for group in groups))
    pieces: list[Piece] = []
    start, size = 0, 0.0
    for stop, group in enumerate(groups, 1):
        size += group.total_byte_size * scale
        if size >= part_bytes or stop == len(groups):
            pieces.append(Piece(path=file.path, size=round(size), start=start, stop=stop))
            start, size = stop, 0.0
    return pieces


@contextmanager
def _open_table(source: SourceConfig, piece: Piece) -> Iterator[Any]:
    """An open table; DataError where it is none, or damaged, also in what is read of it."""
    import pyarrow
    import pyarrow.parquet

    file = piece.path
    try:
        with open_stored(piece) as stream, pyarrow.parquet.ParquetFile(stream) as table:
            yield table
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk or the storage, not of the table
        with open_stored(piece) as stream:
            start = stream.read(len(PARQUET))
        if start != PARQUET:
            remedy = set_format(source, "json` or `format: text")
            raise DataError(f"{file} is not a parquet table; {remedy}.") from error
        raise DataError(
            f"{file} is a damaged parquet table: {' '.join(str(error).split())}"
        ) from error


def _fields(fields: Any) -> dict[str, Any]:
    """The fields of a table or of a column by name: a dictionary of those inside, or a type."""
    import pyarrow

    types = pyarrow.types
    return {
        field.name: _fields(field.type)
        if types.is_struct(field.type)
        else ("" if types.is_string(field.type) else field.type)
        for field in fields
    }


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
