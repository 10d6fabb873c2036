"""Whether the files of shards are those that were written, by their SHA-256 in the manifest."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from data.block_cache import BlockCache
from data.errors import DataError
from data.files import sha256_of
from data.indexed import file_sizes, open_shard
from data.manifest import Manifest, Shard
from data.storage import AnyPath, size_of
from data.token_counts import read_counts

_THREADS = 16  # hashing and reading release the interpreter


@dataclass(frozen=True)
class BrokenFile:
    """A file that is missing or broken; `shard` is None for one of all shards."""

    path: AnyPath
    reason: str
    shard: Shard | None

    def __str__(self) -> str:
        if self.shard is None:
            return f"{self.path}: {self.reason}"
        part = (
            f"source {self.shard.source!r}, {self.shard.split}, {self.shard.documents:,} documents"
        )
        return f"{self.path}: {self.reason} ({part})"


@dataclass(frozen=True)
class Verification:
    """The broken files, how many were hashed, and how many shards have no hashes."""

    broken: list[BrokenFile]
    hashed: int
    without_hashes: int


def verify(
    root: AnyPath, manifest: Manifest, cache: BlockCache, advance: Callable[[float], None]
) -> Verification:
    """Reads all files of the shards in `root`; of those without a hash the structure is checked.

    `advance` is called with the bytes of each file that is done.
    """
    folder = root / manifest.folder

    def check(shard: Shard) -> list[BrokenFile]:
        sizes = file_sizes(shard.name, shard.documents, shard.tokens, manifest.vocab_size)
        broken = []
        for (name, size), expected in zip(sizes, (shard.bin_sha256, shard.idx_sha256), strict=True):
            if expected is not None and (reason := _problem(folder / name, size, expected)):
                broken.append(BrokenFile(folder / name, reason, shard))
            advance(size)
        if shard.bin_sha256 is None or shard.idx_sha256 is None:
            broken += _structure(folder, manifest, shard, cache)
        return broken

    with ThreadPoolExecutor(_THREADS) as pool:
        broken = [one for of_shard in pool.map(check, manifest.shards) for one in of_shard]
    try:
        read_counts(root, manifest)
    except DataError as error:
        path, _, reason = str(error).partition(" is ")
        broken.append(BrokenFile(folder / path.rsplit("/", 1)[-1], reason.split(";")[0], None))
    hashed = sum(
        (shard.bin_sha256 is not None) + (shard.idx_sha256 is not None) for shard in manifest.shards
    )
    without = sum(None in (shard.bin_sha256, shard.idx_sha256) for shard in manifest.shards)
    return Verification(broken, hashed, without)


def _problem(path: AnyPath, size: int, expected: str) -> str:
    """What is wrong with a file; "" where nothing is."""
    try:
        if (found := size_of(path)) != size:
            return f"has {found:,} bytes instead of {size:,}"
        return "" if sha256_of(path) == expected else "has other bytes than were written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _structure(
    folder: AnyPath, manifest: Manifest, shard: Shard, cache: BlockCache
) -> list[BrokenFile]:
    """The problem of a shard without hashes, if opening it finds one."""
    try:
        ends = manifest.document_ends
        open_shard(folder / shard.name, shard.documents, shard.tokens, None, ends, cache)
    except DataError as error:
        return [BrokenFile(folder / shard.name, str(error).split(";")[0], shard)]
    return []
