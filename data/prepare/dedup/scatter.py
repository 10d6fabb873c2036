"""Files of rows in parts: what one task writes, part by part, for each task of the next stage.

Rows are added in any order of parts. They are kept in memory up to a limit and then appended as a
run, sorted by part; within a part, rows stay in the order in which they were added. At the end are
the index [runs, parts + 1], each run's first row of each part, and three numbers: runs, parts, and
`changes`, whose meaning is the task's.
"""

import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data.config import Section
from data.files import fsync_file
from data.prepare.dedup.kernels import Ints, place_rows

_WORD = 8  # bytes of a number of the index


class ScatterWriter:
    """Writes one file; it has its name when the `with` block ends without an error.

    Arguments:
        path: of the file; its folder exists.
        parts: number of parts.
        memory: limit in bytes, of which the rows take a quarter.
    """

    def __init__(self, path: Path, parts: int, memory: int) -> None:
        self.path, self.parts, self.limit = path, parts, memory // 4
        self.changes = 0
        self._partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        self._parts: list[NDArray[Any]] = []
        self._rows: list[NDArray[Any]] = []
        self._size, self._written = 0, 0
        self._index: list[Ints] = []

    def __enter__(self) -> "ScatterWriter":
        self._stream = self._partial.open("wb")
        return self

    def add(self, parts: NDArray[Any], rows: NDArray[Any]) -> None:
        """Adds rows [N, W], each to its part [N]; W and the type are the same in each call."""
        self._parts.append(parts.astype(np.int32))
        self._rows.append(np.ascontiguousarray(rows))
        self._size += rows.nbytes
        if self._size >= self.limit:
            self._flush()

    def _flush(self) -> None:
        if not self._size:
            return
        counts = sum(np.bincount(part, minlength=self.parts) for part in self._parts)
        begins = np.concatenate([[0], np.cumsum(counts)])
        output = np.empty((begins[-1], self._rows[0].shape[1]), dtype=self._rows[0].dtype)
        place = begins[:-1].copy()
        for part, rows in zip(self._parts, self._rows, strict=True):
            place_rows(rows, part, place, output)
        self._parts, self._rows, self._size = [], [], 0
        self._index.append(begins + self._written)
        self._written += len(output)
        self._stream.write(output.data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._flush()
                numbers = [*self._index, np.array([len(self._index), self.parts, self.changes])]
                self._stream.write(np.concatenate(numbers).astype(np.int64).tobytes())
            self._stream.close()
            if kind is None:
                fsync_file(self._partial)
                os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)  # no longer there once renamed


class Output(Section):
    """The files of a stage: one of each of its tasks."""

    stage: str
    count: int

    def paths(self, folder: Path) -> list[Path]:
        """The files, in the order of the tasks."""
        return [output_path(folder, self.stage, number) for number in range(self.count)]

    def remove(self, folder: Path) -> None:
        """Removes the files, of which some may be gone."""
        for path in self.paths(folder):
            path.unlink(missing_ok=True)

    def totals(self, folder: Path) -> tuple[int, int]:
        """(rows, changes) of all files."""
        rows = changes = 0
        for path in self.paths(folder):
            with path.open("rb") as stream:
                runs, _, changed = _footer(stream)
                changes += changed
                if runs:
                    stream.seek(-_WORD * 4, os.SEEK_END)
                    rows += int(_numbers(stream, 1)[0])
        return rows, changes


def output_path(folder: Path, stage: str, number: int) -> Path:
    """The file of one task of a stage."""
    return dedup_folder(folder) / f"{stage}-{number:05d}.bin"


def dedup_folder(folder: Path) -> Path:
    """The folder of all files that only the deduplication needs."""
    return folder / "dedup"


def read_part(
    folder: Path, inputs: Iterable[Output], part: int, width: int, dtype: Any = np.int64
) -> Iterator[NDArray[Any]]:
    """Yields the rows [N, width] of a part, file by file and run by run."""
    row_bytes = width * np.dtype(dtype).itemsize
    for output in inputs:
        for path in output.paths(folder):
            with path.open("rb") as stream:
                runs, parts, _ = _footer(stream)
                index = -_WORD * (3 + runs * (parts + 1))
                for run in range(runs):
                    stream.seek(index + _WORD * (run * (parts + 1) + part), os.SEEK_END)
                    start, stop = _numbers(stream, 2).tolist()
                    if start < stop:
                        stream.seek(start * row_bytes)
                        yield _rows(stream, stop - start, width, dtype)


def _rows(stream: BinaryIO, count: int, width: int, dtype: Any) -> NDArray[Any]:
    rows = np.empty((count, width), dtype=dtype)
    if stream.readinto(rows.view(np.uint8).data) != rows.nbytes:  # type: ignore[attr-defined]
        raise OSError(f"{stream.name} is truncated")
    return rows


def _footer(stream: BinaryIO) -> tuple[int, int, int]:
    stream.seek(-_WORD * 3, os.SEEK_END)
    runs, parts, changes = _numbers(stream, 3).tolist()
    return runs, parts, changes


def _numbers(stream: BinaryIO, count: int) -> Ints:
    return np.frombuffer(stream.read(_WORD * count), dtype=np.int64)
