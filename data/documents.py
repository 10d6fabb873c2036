"""The lengths of all documents of a split in one file, made once from the indexes of its shards.

A run of 10^5 shards then opens one file at its start and a shard when it first reads a document of
it. Of a large source, pages of lengths are in memory where windows need them, and the sums of at
most half a million blocks. `v4 data prepare` makes the file with the shards. Where it is
missing, a loader reads all indexes and writes it into the folder of the tables
(`data.rows.shards.tables_folder`), or an unnamed one on the local disk if that cannot be written.

Of each source the file has numpy arrays, one after another: the type of the ids in each shard, the
longest document, the positions in each block of documents, the tokens before every 64th document,
and the tokens of each document.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.manifest import Shard, Split

Ints = NDArray[np.int64]
ReadLengths = Callable[[Shard], tuple[np.dtype[Any], NDArray[Any]]]
MAX_BLOCKS = 1 << 19
_FORMAT = 1  # of the file
_ANCHOR = 64  # documents
_PAGE = 1 << 13  # numbers that are read together
_MAX_PAGES = 1 << 11  # of an array in memory
_THREADS = 32


@dataclass(frozen=True)
class DocumentTable:
    """The documents of a source in one split, numbered through its shards.

    Attributes:
        dtypes: of the ids in each shard, as numpy names them.
        longest: tokens of the longest document.
        positions [K]: positions in each block of `block_size` documents.
        lengths [D]: tokens of each document.
        anchors: tokens of the source before every `_ANCHOR`-th document.
    """

    dtypes: list[str]
    longest: int
    positions: Ints
    lengths: "PagedArray"
    anchors: "PagedArray"

    def first_token(self, document: int) -> int:
        """Tokens of the source before a document."""
        anchor = document // _ANCHOR
        between = np.arange(anchor * _ANCHOR, document)
        return int(self.anchors.take(np.array([anchor]))[0] + self.lengths.take(between).sum())


def table_file(folder: Path, split: Split) -> Path:
    """Where the table of a split is."""
    return folder / f"documents-{split}.npy"


def by_source(shards: Iterable[Shard]) -> dict[str, list[Shard]]:
    """The shards of each source, in order."""
    of_source: dict[str, list[Shard]] = {}
    for shard in shards:
        of_source.setdefault(shard.source, []).append(shard)
    return of_source


def block_size(documents: int) -> int:
    """Consecutive documents that an epoch keeps together."""
    return max(1, -(-documents // MAX_BLOCKS))


class PagedArray:
    """An array in a file, of which pages are read when they are first needed.

    Arguments:
        file: open as long as the array is in use.
        offset: of its first number. [bytes]
    """

    def __init__(self, file: BinaryIO, offset: int, dtype: np.dtype[Any], size: int) -> None:
        self._file, self._offset, self._dtype, self.size = file, offset, dtype, size
        self._pages: dict[int, NDArray[Any]] = {}

    def take(self, indices: Ints) -> Ints:
        """The numbers at `indices`."""
        values = np.empty(len(indices), dtype=np.int64)
        if not len(indices):
            return values
        pages = indices // _PAGE
        if pages[0] == pages[-1] and (pages == pages[0]).all():
            values[:] = self._page(int(pages[0]))[indices - pages[0] * _PAGE]
            return values
        order = np.argsort(pages, kind="stable")
        bounds = np.flatnonzero(np.diff(pages[order], prepend=-1, append=-1))
        for start, end in pairwise(bounds.tolist()):
            of_page = order[start:end]
            page = int(pages[of_page[0]])
            values[of_page] = self._page(page)[indices[of_page] - page * _PAGE]
        return values

    def _page(self, number: int) -> NDArray[Any]:
        page = self._pages.get(number)
        if page is None:
            start = number * _PAGE
            count, itemsize = min(_PAGE, self.size - start), self._dtype.itemsize
            content = os.pread(
                self._file.fileno(), count * itemsize, self._offset + start * itemsize
            )
            if len(content) < count * itemsize:
                raise DataError("the table of documents was truncated; start again.")
            page = np.frombuffer(content, self._dtype)
            if len(self._pages) >= _MAX_PAGES:
                self._pages.clear()
            self._pages[number] = page
        return page


def open_tables(
    file: Path,
    digest: str,
    shards: dict[str, list[Shard]],
    read_lengths: ReadLengths,
) -> dict[str, DocumentTable]:
    """The table of each source, from a file that was written with the same digest, or new.

    Arguments:
        digest: identifies the documents of the shards.
        shards: of each source, in order.
        read_lengths: returns the type of a shard's ids and the tokens of each document, where a
            new table is made.
    """
    key = f"{_FORMAT} {digest}"
    with suppress(OSError, ValueError, EOFError):
        stream = file.open("rb")
        if str(np.load(stream, allow_pickle=False)) == key:
            return {source: _read(stream, len(of_source)) for source, of_source in shards.items()}
    stream = _new_file(file)
    try:
        np.save(stream, np.array(key), allow_pickle=False)
        for of_source in shards.values():
            _write(stream, of_source, read_lengths)
        stream.flush()
        os.fsync(stream.fileno())
        if isinstance(stream.name, str):
            os.chmod(stream.name, 0o644)
            os.replace(stream.name, file)
    except OSError as error:
        raise DataError(f"cannot write {file}: {error.strerror or error}.") from error
    finally:
        if isinstance(stream.name, str):
            Path(stream.name).unlink(missing_ok=True)
    stream.seek(0)
    np.load(stream, allow_pickle=False)
    return {source: _read(stream, len(of_source)) for source, of_source in shards.items()}


def _new_file(file: Path) -> Any:
    """A file beside `file`, or an unnamed one where its folder cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    except OSError:
        return tempfile.TemporaryFile()
    os.close(handle)
    return open(name, "w+b")


def _write(stream: BinaryIO, shards: Sequence[Shard], read_lengths: ReadLengths) -> None:
    """Writes the arrays of a source."""
    dtypes, parts = [], []
    for dtype, lengths_of_shard in _read_all(shards, read_lengths):
        dtypes.append(dtype.str)
        parts.append(lengths_of_shard)
    lengths: NDArray[Any] = np.concatenate(parts)
    longest = int(lengths.max()) if len(lengths) else 0
    ends = np.cumsum(lengths, dtype=np.int64)
    first = np.arange(0, len(lengths), block_size(len(lengths)))
    positions = np.zeros(0, dtype=np.int64)
    if len(lengths):
        totals = np.add.reduceat(np.maximum(lengths, 1), first, dtype=np.int64)
        positions = totals - np.diff(first, append=len(lengths))
    anchors = (ends - lengths)[::_ANCHOR]
    width = np.int32 if longest < 1 << 31 else np.int64
    for array in (np.array(dtypes), np.array(longest), positions, anchors, lengths.astype(width)):
        np.save(stream, array, allow_pickle=False)


def _read_all(
    shards: Sequence[Shard], read_lengths: ReadLengths
) -> Iterator[tuple[np.dtype[Any], NDArray[Any]]]:
    """Yields what is read of each shard in order, some of them ahead."""
    size = 16 * _THREADS
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(shards), size):
            yield from pool.map(read_lengths, shards[first : first + size])


def _read(stream: BinaryIO, shards: int) -> DocumentTable:
    """The table of the next source; ValueError where the file ends early."""
    dtypes = np.load(stream, allow_pickle=False).tolist()
    longest = int(np.load(stream, allow_pickle=False))
    positions = np.load(stream, allow_pickle=False)
    anchors, lengths = _paged(stream), _paged(stream)
    if len(dtypes) != shards:
        raise ValueError("of other shards")
    return DocumentTable(dtypes, longest, positions, lengths, anchors)


def _paged(stream: BinaryIO) -> PagedArray:
    """The next array of a file, which is not read."""
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an array of another version")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    offset, size = stream.tell(), shape[0]
    end = offset + size * dtype.itemsize
    if os.fstat(stream.fileno()).st_size < end:
        raise ValueError("the file ends early")
    stream.seek(end)
    return PagedArray(stream, offset, dtype, size)
