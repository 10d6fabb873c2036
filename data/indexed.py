"""megatron-core's `.bin/.idx` files: reading them, and the bytes of an index.

The index has a header, the length [int32] and byte offset [int64] of every sequence, and the
sequence [int64] at which each document begins, and one past the last. A document of ours is one
sequence of tokens, [bos] + text + [eos].
"""

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data.block_cache import BlockCache, default_folder
from data.config import CacheConfig, DataConfig
from data.errors import DataError
from data.storage import AnyPath, StoragePath, as_path

# magic, version, code of the token type, number of sequences, number of document boundaries
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are no integers
_BYTES_PER_SEQUENCE = 4 + 8  # length and offset
_BYTES_PER_BOUNDARY = 8
_ANCHOR = 64  # documents
_BLOCK = 1 << 22  # tokens


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type of the ids in a `.bin`, as megatron-core chooses it."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def index_bytes(lengths: Sequence[int], dtype: np.dtype[Any]) -> bytes:
    """The `.idx` of documents of so many tokens, each of them one sequence."""
    code = next(code for code, name in _DTYPES.items() if np.dtype(name) == dtype)
    ends = np.cumsum(lengths, dtype=np.int64)
    pointers = (ends - lengths) * dtype.itemsize
    header = _HEADER.pack(_MAGIC, _VERSION, code, len(lengths), len(lengths) + 1)
    arrays = (
        np.array(lengths, "<i4"),
        pointers.astype("<i8"),
        np.arange(len(lengths) + 1, dtype="<i8"),
    )
    return header + b"".join(array.tobytes() for array in arrays)


def file_sizes(name: str, documents: int, tokens: int, vocab_size: int) -> list[tuple[str, int]]:
    """Names and bytes of the files of a shard in which each document is one sequence."""
    size = tokens * token_dtype(vocab_size).itemsize
    return [(f"{name}.bin", size), (f"{name}.idx", index_size(documents))]


def index_size(documents: int) -> int:
    """Bytes of the index of documents of one sequence each."""
    return _HEADER.size + documents * _BYTES_PER_SEQUENCE + (documents + 1) * _BYTES_PER_BOUNDARY


class ShardFile(Protocol):
    """A file of a shard, on a file system or in object storage; `size` in bytes."""

    @property
    def size(self) -> int: ...

    def read(self, start: int, size: int) -> bytes:
        """Returns `size` bytes from `start`, fewer at the end of the file."""

    def array(self, start: int, dtype: Any, count: int) -> NDArray[Any]:
        """Returns `count` numbers from the byte `start` on."""


class LocalFile:
    """A file on a file system, which is opened for every read."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.size = os.path.getsize(path)

    def read(self, start: int, size: int) -> bytes:
        """Returns `size` bytes from `start`, fewer at the end of the file."""
        with open(self.path, "rb") as stream:
            stream.seek(start)
            return stream.read(size)

    def array(self, start: int, dtype: Any, count: int) -> NDArray[Any]:
        """Returns `count` numbers from the byte `start` on."""
        return np.fromfile(self.path, dtype, count, offset=start)


@dataclass(frozen=True)
class TokenFile:
    """The `.bin` of a shard, opened.

    The ids are read from the file whenever they are asked for. A mapping would be faster, and would
    kill the process (SIGBUS) where the file is truncated while a run reads it.

    Attributes:
        file: what is read.
        path: its name.
        dtype: of the ids in the file.
        vocab_size: ids have to be below it, if given.
        ends: bos and eos, if every document has them.
    """

    file: ShardFile
    path: str
    dtype: np.dtype[Any]
    vocab_size: int | None
    ends: tuple[int, int] | None

    def read(
        self, document: int, first: int, length: int, start: int = 0, end: int | None = None
    ) -> NDArray[Any]:
        """The ids of a document, bos and eos included, or those from `start` until before `end`.

        Arguments:
            document: its number, for errors.
            first: tokens before it.
            length: its tokens.

        Raises DataError where the file has been truncated, an id is not in the vocabulary, or the
        document lacks its bos or eos: a file of the right size may hold zeros after a crash.
        """
        end = length if end is None else min(end, length)
        ids = self.read_ids(document, first + start, max(start, end) - start)
        if self.ends is not None and len(ids):
            bos, eos = self.ends
            if (start == 0 and ids[0] != bos) or (end == length and ids[-1] != eos):
                raise _damaged(
                    f"{self.path} has been altered: document {document} does not begin with "
                    f"the id {bos} and end with {eos}"
                )
        return ids

    def read_ids(self, document: int, first: int, count: int) -> NDArray[Any]:
        """The `count` ids from number `first` on, which belong to `document` and later ones."""
        itemsize = self.dtype.itemsize
        size = count * itemsize
        try:
            content = self.file.read(first * itemsize, size)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        if len(content) < size:
            raise _damaged(
                f"{self.path} has been truncated: it ends before document {document} does"
            )
        ids = np.frombuffer(content, self.dtype)
        if self.vocab_size is not None and size:
            largest = int(ids.view(f"u{itemsize}").max())  # negative ones are large there
            if largest >= self.vocab_size:
                value = ids.min() if self.dtype.kind == "i" and ids.min() < 0 else largest
                raise DataError(
                    f"{self.path} has the id {value} in or after document {document}, which is not "
                    f"in the vocabulary of {self.vocab_size}."
                )
        return ids


@dataclass(frozen=True)
class IndexedShard:
    """One `.bin/.idx` pair, opened.

    Attributes:
        tokens: the `.bin`.
        tables: the local path, without an ending, of what is computed from the shard.
        lengths [documents]: tokens of each document.
        anchors: index of the first token of every `_ANCHOR`-th document.
    """

    tokens: TokenFile
    tables: Path
    lengths: NDArray[np.int64] | NDArray[np.int32]
    anchors: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """Yields the ids of each document."""
        return (self.read(document) for document in range(len(self)))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the ids in the file."""
        return self.tokens.dtype

    def read(self, document: int, start: int = 0, end: int | None = None) -> NDArray[Any]:
        """The ids of a document, as `TokenFile.read`."""
        length = int(self.lengths[document])
        return self.tokens.read(document, self._first(document), length, start, end)

    def blocks(self, tokens: int = _BLOCK) -> Iterator[tuple[int, int, NDArray[Any]]]:
        """Yields (first document, next one, ids of those between), about `tokens` at a time."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        first = 0
        while first < len(self):
            begin = int(ends[first]) - int(self.lengths[first])
            end = max(first + 1, int(np.searchsorted(ends, begin + tokens, side="right")))
            yield first, end, self.tokens.read_ids(first, begin, int(ends[end - 1]) - begin)
            first = end

    def _first(self, document: int) -> int:
        anchor = document // _ANCHOR
        before = self.lengths[anchor * _ANCHOR : document].sum(dtype=np.int64)
        return int(self.anchors[anchor] + before)


def open_cache(config: DataConfig) -> BlockCache:
    """Returns the cache for shards in object storage."""
    folder = config.cache.folder
    return BlockCache(default_folder() if folder is None else Path(folder), config.cache.max_bytes)


def shard_cache() -> BlockCache:
    """Returns the cache for commands on shards that have no config."""
    return BlockCache(default_folder(), CacheConfig().max_bytes)


def open_shard(
    prefix: AnyPath,
    documents: int,
    tokens: int,
    vocab_size: int | None = None,
    ends: tuple[int, int] | None = None,
    cache: BlockCache | None = None,
) -> IndexedShard:
    """Opens the shard at `prefix`, of `documents` documents and `tokens` tokens in all.

    A document may consist of several sequences, as Megatron's tools make them from sentences: they
    are read as one. With `ends`, the first and the last document are compared with it now, the
    others when they are read. `cache` is for shards in object storage. Raises DataError where a
    file is missing, cannot be read, or does not have the size and the contents of such an index.
    """
    path = f"{prefix}.idx"
    try:
        index, tokens_file = (_open_file(f"{prefix}{ending}", cache) for ending in (".idx", ".bin"))
        header = index.read(0, _HEADER.size)
        if len(header) < _HEADER.size:
            raise _damaged(f"{path} has {len(header)} bytes, less than a header")
        magic, version, code, sequences, boundaries = _HEADER.unpack(header)
        if (magic, version, boundaries) != (_MAGIC, _VERSION, documents + 1) or code not in _DTYPES:
            raise _damaged(f"{path} does not begin like the index of {documents} documents")
        expected = _HEADER.size + sequences * _BYTES_PER_SEQUENCE
        expected += boundaries * _BYTES_PER_BOUNDARY
        if index.size != expected:
            raise _damaged(f"{path} has {index.size} bytes instead of {expected}")
        at = _HEADER.size
        lengths = index.array(at, "<i4", sequences)
        pointers = index.array(at + 4 * sequences, "<i8", sequences)
        bounds = index.array(at + _BYTES_PER_SEQUENCE * sequences, "<i8", boundaries)
    except OSError as error:
        raise _damaged(f"{error.filename} cannot be read ({error.strerror})") from error
    dtype = np.dtype(_DTYPES[code])
    if (size := tokens_file.size) != tokens * dtype.itemsize:
        raise _damaged(f"{prefix}.bin has {size} bytes instead of {tokens * dtype.itemsize}")
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if starts[-1] != tokens or (sequences and lengths.min() < 0):
        raise _damaged(f"{path} does not add up to {tokens} tokens")
    if not np.array_equal(pointers, starts[:-1] * dtype.itemsize):
        raise _damaged(f"{path} does not have its sequences one after another")
    steps = np.diff(bounds)
    if bounds[0] != 0 or bounds[-1] != sequences or (documents and steps.min() < 0):
        raise _damaged(f"{path} does not divide {sequences} sequences among its documents")
    if not (steps == 1).all():
        starts = starts[bounds]
        lengths = np.diff(starts)
    anchors = starts[:-1:_ANCHOR].copy()
    token_file = TokenFile(tokens_file, f"{prefix}.bin", dtype, vocab_size, ends)
    shard = IndexedShard(token_file, _tables_of(prefix, cache), lengths, anchors)
    if documents and ends is not None:
        shard.read(0, 0, 1)
        shard.read(documents - 1, max(int(lengths[-1]) - 1, 0))
    return shard


def open_tokens(
    prefix: AnyPath,
    tokens: int,
    dtype: np.dtype[Any],
    vocab_size: int,
    ends: tuple[int, int] | None,
    cache: BlockCache,
    sha256: str | None,
) -> TokenFile:
    """Opens the `.bin` of a shard whose index has been read before.

    With its `sha256`, which names its blocks in the cache, no request is made for an object in
    storage. Raises DataError where the file is missing, or has not the size of so many tokens.
    """
    path, size = f"{prefix}.bin", tokens * dtype.itemsize
    try:
        place = as_path(path)
        if isinstance(place, StoragePath) and sha256 is not None:
            file: ShardFile = cache.open_known(place, size, sha256)
        else:
            file = _open_file(path, cache)
    except OSError as error:
        raise _damaged(f"{path} cannot be read ({error.strerror})") from error
    if file.size != size:
        raise _damaged(f"{path} has {file.size} bytes instead of {size}")
    return TokenFile(file, path, dtype, vocab_size, ends)


def _open_file(path: str, cache: BlockCache | None) -> ShardFile:
    place = as_path(path)
    if isinstance(place, Path):
        return LocalFile(path)
    assert cache is not None, f"{path} is read through a cache"
    return cache.open(place)


def _tables_of(prefix: AnyPath, cache: BlockCache | None) -> Path:
    if isinstance(prefix, Path):
        return prefix
    assert cache is not None
    return cache.tables(prefix.parent) / prefix.name


def _damaged(what: str) -> DataError:
    return DataError(f"{what}; make the shards again with `v4 data prepare CONFIG`.")
