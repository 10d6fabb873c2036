"""Blocks of large objects, kept on a local disk up to a limit.

A run reads the documents of its shards in random order, a few kilobytes at a time: each read of an
object fetches the whole block around it, once for all processes of a host. Blocks appear whole,
after their bytes are on the disk. The oldest are removed first, which with reads in random order is
as good as removing those unused for longest.
"""

import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.activity import print_line
from data.storage import StoragePath

BLOCK_BYTES = 1 << 20
_BLOCKS = "blocks"
_TABLES = "tables"


def default_folder() -> Path:
    """Returns where blocks are kept by default: in the user's cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "v4-pretrain" / "shards"


class BlockCache:
    """A folder of blocks that the processes of a host share.

    Every process looks at the size after it has written a 64th of `max_bytes`, and leaves an eighth
    free, so that up to eight processes stay within it.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._unchecked = max_bytes  # bytes written since the last look
        self._has_warned = False
        self._lock = threading.Lock()

    def open(self, path: StoragePath) -> "CachedObject":
        """Opens an object. Raises OSError where there is none."""
        facts = path.info()
        if facts is None:
            raise FileNotFoundError(2, "does not exist", str(path))
        size = int(facts["size"])
        version = next((facts[name] for name in ("ETag", "etag", "mtime") if name in facts), "")
        return CachedObject(self, path, size, _digest(f"{path} {size} {version}"))

    def open_known(self, path: StoragePath, size: int, sha256: str) -> "CachedObject":
        """Opens an object of known size and content, without a request."""
        return CachedObject(self, path, size, _digest(f"{size} {sha256}"))

    def tables(self, path: StoragePath) -> Path:
        """Returns the local folder for what is computed from the objects in a folder."""
        return self.folder / _TABLES / _digest(path.url)

    def block(self, key: str, number: int) -> Path:
        """Returns the file of a block."""
        return self.folder / _BLOCKS / key / f"{number:08d}"

    def keep(self, file: Path, content: bytes) -> None:
        """Writes a block, and removes others where there are too many.

        A disk that is full or cannot be written is reported once; reading continues without it.
        """
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=file.parent, prefix=".")
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(name, file)
            finally:
                Path(name).unlink(missing_ok=True)  # no longer there once renamed
        except OSError as error:
            self._warn(error)
            return
        with self._lock:
            self._unchecked += len(content)
            if self._unchecked > self.max_bytes // 64:
                self._unchecked = 0
                self._evict()

    def _warn(self, error: OSError) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        print_line(
            f"v4: warning: {self.folder}: {error.strerror}; shards are read without a cache, which "
            "is slower (data.cache)",
            sys.stderr,
        )

    def _evict(self) -> None:
        """Removes the oldest blocks until a quarter of `max_bytes` is free, if no eighth is."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        if total <= self.max_bytes * 7 // 8:
            return
        for _, size, path in files:
            if total <= self.max_bytes * 3 // 4:
                return
            with suppress(OSError):  # another process has removed it
                os.unlink(path)
            total -= size

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """Yields time, size and path of every block."""
        with suppress(FileNotFoundError):
            for folder in os.scandir(self.folder / _BLOCKS):
                for entry in os.scandir(folder):
                    with suppress(FileNotFoundError):
                        stat = entry.stat()
                        yield stat.st_mtime_ns, stat.st_size, entry.path


class CachedObject:
    """An object that is read through the cache; `size` in bytes.

    `staged` has ranges in memory, by their start and end, which are read before the cache.
    """

    def __init__(self, cache: BlockCache, path: StoragePath, size: int, key: str) -> None:
        self.cache, self.path, self.size, self._key = cache, path, size, key
        self.staged: dict[tuple[int, int], bytes] = {}

    def read(self, start: int, size: int) -> bytes:
        """Returns `size` bytes from `start`, fewer at the object's end. Raises OSError."""
        end = min(start + size, self.size)
        if (staged := self.staged.get((start, end))) is not None:
            return staged
        parts = []
        while start < end:
            number = start // BLOCK_BYTES
            stop = min(end, (number + 1) * BLOCK_BYTES)
            parts.append(self._read(number, start - number * BLOCK_BYTES, stop - start))
            start = stop
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def array(self, start: int, dtype: Any, count: int) -> NDArray[Any]:
        """Returns `count` numbers from the byte `start` on."""
        content = bytearray(self.read(start, count * np.dtype(dtype).itemsize))
        return np.frombuffer(content, dtype)

    def stage(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetches ranges, and what is between them, in one request into `staged`."""
        begin, end = min(start for start, _ in ranges), max(end for _, end in ranges)
        content = self._fetch(begin, end)
        for start, stop in ranges:
            self.staged[start, stop] = content[start - begin : stop - begin]

    def has_block(self, number: int) -> bool:
        """Whether a block is in the cache."""
        return self.cache.block(self._key, number).exists()

    def fetch_block(self, number: int) -> bytes:
        """Fetches a block into the cache."""
        begin = number * BLOCK_BYTES
        block = self._fetch(begin, min(begin + BLOCK_BYTES, self.size))
        self.cache.keep(self.cache.block(self._key, number), block)
        return block

    def _read(self, number: int, start: int, size: int) -> bytes:
        """Returns bytes of a block."""
        with suppress(OSError), self.cache.block(self._key, number).open("rb") as stream:
            stream.seek(start)
            content = stream.read(size)
            if len(content) == size:
                return content
        return self.fetch_block(number)[start : start + size]

    def _fetch(self, begin: int, end: int) -> bytes:
        (content,) = self.path.read_ranges([(begin, end)])
        if len(content) != end - begin:
            raise OSError(0, f"has ended at byte {begin + len(content)}", str(self.path))
        return content


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
