"""The token shards of a split, opened for reading."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.block_cache import BlockCache, CachedObject
from data.config import DataConfig
from data.documents import DocumentTable, by_source, open_tables, table_file
from data.errors import DataError
from data.files import sha256_of, write_atomically
from data.indexed import (
    IndexedShard,
    TokenFile,
    index_size,
    open_cache,
    open_shard,
    open_tokens,
)
from data.manifest import Manifest, Shard, Split
from data.rows.fetch import ByteRange, Fetcher
from data.rows.presence import ExpectedFile, PresenceCheck
from data.storage import AnyPath, StoragePath, as_path
from data.text import tokenizer_file

_FEW = 1000  # shards that are checked before a loader begins


def matching_manifest(config: DataConfig) -> Manifest:
    """The manifest of `config.shards`.

    Raises DataError where another tokenizer, or other settings of the config, made the shards.
    """
    manifest = Manifest.load(config.shards)
    file = tokenizer_file(config.tokenizer.path)
    if sha256_of(file) != manifest.tokenizer_hash:
        raise DataError(
            f"the shards in {config.shards} were made with another tokenizer than {file}; make "
            "shards with this one in another folder (`v4 data prepare CONFIG data.shards=FOLDER "
            f"data.tokenizer.path={config.tokenizer.path}`), or set data.tokenizer.path to theirs."
        )
    if (stale := manifest.stale_setting(config)) is not None:
        key, now, then = stale
        raise DataError(
            f"{key} is {now!r}, and the shards in {config.shards} were made with {then!r}; "
            "restore it, or prepare others with `v4 data prepare CONFIG` in another data.shards."
        )
    return manifest


def content_digest(config: DataConfig, manifest: Manifest) -> str:
    """Identifies the documents of `config.shards`.

    The digest of `v4 data prepare` does. That of another tool's manifest is whatever somebody wrote
    there, so the index files are hashed as well.
    """
    if manifest.document_ends is not None:
        return manifest.digest
    root = as_path(config.shards) / manifest.folder
    parts = [manifest.digest, *(sha256_of(root / f"{s.name}.idx") for s in manifest.shards)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def tables_folder(config: DataConfig, manifest: Manifest) -> Path:
    """Returns the local folder for what is computed from the shards: theirs, or in the cache."""
    root = as_path(config.shards) / manifest.folder
    return open_cache(config).tables(root) if isinstance(root, StoragePath) else root


class SourceDocuments:
    """The documents of a source in one split, over all its shards, which are opened when read.

    Attributes:
        domain: of the source.
        count: number of documents, which are numbered through the shards.
        table: their lengths.
    """

    def __init__(
        self,
        config: DataConfig,
        manifest: Manifest,
        shards: list[Shard],
        table: DocumentTable,
        cache: BlockCache,
    ) -> None:
        self.domain, self.table, self._shards = shards[0].domain, table, shards
        self._root, self._cache = as_path(config.shards) / manifest.folder, cache
        self._manifest = manifest
        documents = [shard.documents for shard in shards]
        self._first_of_shard = np.cumsum([0, *documents])
        self._tokens_before = np.cumsum([0, *(shard.tokens for shard in shards)])
        self._opened: dict[int, TokenFile] = {}
        self.count = int(self._first_of_shard[-1])

    def read(self, document: int, start: int = 0, end: int | None = None) -> NDArray[Any]:
        """The ids of a document, as `TokenFile.read`."""
        index, first, length = self.locate(document)
        local = document - int(self._first_of_shard[index])
        return self.tokens(index).read(local, first, length, start, end)

    def byte_range(self, document: int, start: int, end: int | None) -> ByteRange | None:
        """What `read` reads of an object; None of a local file."""
        index, first, length = self.locate(document)
        tokens = self.tokens(index)
        if not isinstance(tokens.file, CachedObject):
            return None
        itemsize, end = tokens.dtype.itemsize, length if end is None else min(end, length)
        begin = (first + start) * itemsize
        return ByteRange(tokens.file, begin, max(begin, (first + end) * itemsize))

    @property
    def num_bytes(self) -> int:
        """Bytes of all `.bin` files."""
        sizes = {dtype: np.dtype(dtype).itemsize for dtype in set(self.table.dtypes)}
        pairs = zip(self._shards, self.table.dtypes, strict=True)
        return sum(shard.tokens * sizes[dtype] for shard, dtype in pairs)

    def locate(self, document: int) -> tuple[int, int, int]:
        """(index of its shard, tokens of the shard before it, its own tokens) of a document."""
        index = int(np.searchsorted(self._first_of_shard, document, side="right")) - 1
        first = self.table.first_token(document) - int(self._tokens_before[index])
        return index, first, int(self.table.lengths.take(np.array([document]))[0])

    def tokens(self, index: int) -> TokenFile:
        """The `.bin` of a shard."""
        opened = self._opened.get(index)
        if opened is None:
            shard, manifest = self._shards[index], self._manifest
            opened = self._opened[index] = open_tokens(
                self._root / shard.name,
                shard.tokens,
                np.dtype(self.table.dtypes[index]),
                manifest.vocab_size,
                manifest.document_ends,
                self._cache,
                shard.bin_sha256,
            )
        return opened

    def files(self) -> Iterator[ExpectedFile]:
        """Yields what has to be there."""
        ours = self._manifest.document_ends is not None
        itemsize = {dtype: np.dtype(dtype).itemsize for dtype in set(self.table.dtypes)}
        for shard, dtype in zip(self._shards, self.table.dtypes, strict=True):
            yield ExpectedFile(f"{shard.name}.bin", shard.tokens * itemsize[dtype])
            index = index_size(shard.documents) if ours else None  # others may divide documents
            yield ExpectedFile(f"{shard.name}.idx", index)

    def read_ends(self) -> None:
        """Reads the first and the last document of every shard, which checks them."""
        for first, end in pairwise(self._first_of_shard.tolist()):
            if first < end:
                self.read(first, 0, 1)
                self.read(end - 1, 0)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self._shards)

    def shards(self) -> Iterator[IndexedShard]:
        """Opens each shard with its index."""
        manifest, ends = self._manifest, self._manifest.document_ends
        return (_open(self._root, self._cache, manifest, shard, ends) for shard in self._shards)


def open_split(
    config: DataConfig, manifest: Manifest, digest: str, split: Split, source: str | None
) -> dict[str, SourceDocuments]:
    """The documents of each source of a split, or of one `source` only.

    Arguments:
        digest: identifies the documents of the shards.

    Raises DataError where a shard is missing or damaged, or there is none.
    """
    root, cache = as_path(config.shards) / manifest.folder, open_cache(config)
    shards = by_source(manifest.of_split(split))
    if not shards or source not in (None, *shards):
        raise DataError(
            f"the shards in {config.shards} hold no document of the {split} split; "
            "see `validation_fraction` and the sources' `split`."
        )
    file = table_file(tables_folder(config, manifest), split)
    if isinstance(root, StoragePath) and not file.exists():
        _fetch(root / file.name, file)

    def read_lengths(shard: Shard) -> tuple[np.dtype[Any], NDArray[Any]]:
        # Objects appear whole, so that their ends need no check before they are read.
        ends = manifest.document_ends if isinstance(root, Path) else None
        opened = _open(root, cache, manifest, shard, ends)
        return opened.dtype, opened.lengths

    tables = open_tables(file, digest, shards, read_lengths)
    return {
        name: SourceDocuments(config, manifest, of_source, tables[name], cache)
        for name, of_source in shards.items()
        if source in (None, name)
    }


def open_fetcher(
    config: DataConfig,
    sources: Iterable[SourceDocuments],
    ranges_of: Callable[[int, int], list[ByteRange] | None],
) -> Fetcher | None:
    """What fetches ahead where shards are in object storage; None for local ones."""
    if not isinstance(as_path(config.shards), StoragePath):
        return None
    # Of a cache an eighth is left free.
    fits = sum(source.num_bytes for source in sources) <= config.cache.max_bytes * 3 // 4
    return Fetcher(ranges_of, fits, config.cache.ahead_bytes)


def check_presence(
    config: DataConfig, manifest: Manifest, sources: Iterable[SourceDocuments]
) -> PresenceCheck:
    """Returns a check of the files of shards, whose result it waits for where they are few.

    Of few local ones the first and the last document are read, too: a crash of the host may leave
    files of zeros, which objects in storage never are.
    """
    of_all = list(sources)
    root = as_path(config.shards) / manifest.folder
    check = PresenceCheck(root, lambda: [file for source in of_all for file in source.files()])
    if sum(source.num_shards for source in of_all) <= _FEW:
        check.wait()
        for source in of_all if isinstance(root, Path) else ():
            source.read_ends()
    return check


def _fetch(table: StoragePath, file: Path) -> None:
    """Copies a table from object storage, if it is there and can be written here."""
    with suppress(DataError, FileNotFoundError):
        write_atomically(file, table.read_bytes())


def _open(
    root: AnyPath,
    cache: BlockCache,
    manifest: Manifest,
    shard: Shard,
    ends: tuple[int, int] | None,
) -> IndexedShard:
    prefix, vocab_size = root / shard.name, manifest.vocab_size
    return open_shard(prefix, shard.documents, shard.tokens, vocab_size, ends, cache)
