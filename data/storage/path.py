"""Paths of objects in a storage that fsspec reaches, with the methods of pathlib that are needed.

An object appears whole or not at all, which no rename has to ensure; a folder is nothing but the
common beginning of names. Every operation is repeated where its failure may pass.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from data.storage.parts import Parts
from data.storage.retries import open_driver, with_retries
from data.storage.url import check_url, is_url

Item = TypeVar("Item")

READ_BYTES = 16 << 20
"""Size of a request where a whole object is read. [bytes]"""
AT_ONCE = 4
"""Requests in flight where a whole object is read."""
PART_BYTES = 8 << 20
"""Of an object that is uploaded in parts, of which drivers have ten in flight."""
WRITE_SECONDS = 60.0
SLOWEST_BYTES = 1 << 20
"""An upload may take `WRITE_SECONDS`, and a second for every so many bytes, before it is given up
and repeated: drivers wait indefinitely for a peer that no longer takes anything."""


class StoragePath:
    """A place in object storage; methods raise OSError with its URL.

    Has no `__fspath__`: what can only open local files refuses it.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"StoragePath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoragePath) and self.url == other.url

    def __lt__(self, other: StoragePath) -> bool:
        return self.url < other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __truediv__(self, name: str) -> StoragePath:
        return StoragePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rsplit("/", 1)[1]

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return Path(self.name).suffix

    @property
    def parent(self) -> StoragePath:
        """The folder above; of a bucket, the bucket."""
        above = self.url.rsplit("/", 1)[0]
        return self if above.endswith(":/") else StoragePath(above)

    def with_name(self, name: str) -> StoragePath:
        """Returns the place beside this one with another name."""
        return self.parent / name

    @property
    def _driver(self) -> Any:
        return open_driver(self.url.split("://", 1)[0])

    def attempt(self, action: Callable[[Any], Item]) -> Item:
        """Returns `action(driver)`, repeated where its failure may pass."""
        driver = self._driver
        return with_retries(lambda: action(driver), self.url)

    def info(self, **options: Any) -> dict[str, Any] | None:
        """Returns the driver's facts about an object; None where there is none.

        Arguments:
            options: of the driver.
        """
        try:
            facts: dict[str, Any] = self.attempt(lambda driver: driver.info(self.url, **options))
        except FileNotFoundError as error:
            self.require_bucket(error)
            return None
        return facts if facts["type"] == "file" else None

    def require_bucket(self, error: FileNotFoundError) -> None:
        """Raises the error where it is the bucket that is not there."""
        if (error.strerror or "").startswith("the bucket"):
            raise error

    def is_file(self) -> bool:
        """Whether there is an object."""
        return self.info() is not None

    def is_dir(self) -> bool:
        """Whether there is an object below."""
        return bool(self.names())

    def exists(self) -> bool:
        """Whether there is an object, or one below."""
        return self.is_file() or self.is_dir()

    def names(self) -> list[str]:
        """Returns the names of objects and folders in this folder, which may be out of date.

        Raises FileNotFoundError where the bucket is not there.
        """
        try:
            paths = self.attempt(lambda driver: driver.ls(self.url, detail=False, refresh=True))
        except FileNotFoundError as error:
            self.require_bucket(error)
            self.check_bucket()
            return []
        names = {path.rstrip("/").rsplit("/", 1)[-1] for path in paths}
        own = {self.name} if self.url.split("://", 1)[1] in map(plain_name, paths) else set()
        return sorted(names - own - {""})

    def check_bucket(self) -> None:
        """Raises FileNotFoundError where the bucket is not there; drivers do not name the cause."""
        protocol, place = self.url.split("://", 1)
        if protocol not in ("s3", "s3a", "gs", "gcs"):
            return
        bucket = StoragePath(f"{protocol}://{place.split('/', 1)[0]}")
        try:
            bucket.attempt(lambda driver: driver.ls(bucket.url, detail=False, refresh=True))
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "the bucket does not exist", bucket.url) from None
        except PermissionError:
            return  # whoever may only see the folder sees no other name

    def iterdir(self) -> Iterator[StoragePath]:
        """Yields the objects and folders in this folder."""
        return (self / name for name in self.names())

    def glob(self, pattern: str) -> Iterator[StoragePath]:
        """Yields those whose name fits the pattern."""
        return (self / name for name in self.names() if fnmatchcase(name, pattern))

    def sizes(self) -> dict[str, int]:
        """Returns the size of every object in this folder by name, as the storage lists them."""
        try:
            facts = self.attempt(lambda driver: driver.ls(self.url, detail=True, refresh=True))
        except FileNotFoundError as error:
            self.require_bucket(error)
            return {}
        return {
            one["name"].rsplit("/", 1)[-1]: one["size"] for one in facts if one["type"] == "file"
        }

    def size(self) -> int:
        """Returns the size of the object. Raises FileNotFoundError. [bytes]"""
        facts = self.info()
        if facts is None:
            raise FileNotFoundError(errno.ENOENT, "does not exist", self.url)
        return int(facts["size"])

    def modified(self) -> float | None:
        """Returns when the object was written, by the storage's clock; None without an object."""
        try:
            return float(self.attempt(lambda driver: driver.modified(self.url)).timestamp())
        except FileNotFoundError as error:
            self.require_bucket(error)
            return None

    def read_bytes(self) -> bytes:
        """Returns the whole object, which has to fit into memory."""
        return bytes(self.attempt(lambda driver: driver.cat_file(self.url)))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Returns the text of the object."""
        return self.read_bytes().decode(encoding)

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Returns the bytes from `start` until before `end` for each range, read concurrently.

        A range beyond the object's end is cut there.
        """
        starts, ends = [start for start, _ in ranges], [end for _, end in ranges]

        def read_range(driver: Any, start: int, end: int) -> bytes:
            return bytes(driver.cat_file(self.url, start=start, end=end, cache_type="none"))

        def read(driver: Any) -> list[bytes]:
            if not driver.async_impl:
                with ThreadPoolExecutor(AT_ONCE) as pool:
                    return list(pool.map(partial(read_range, driver), starts, ends))
            urls = [self.url] * len(ranges)
            blocks: list[bytes] = driver.cat_ranges(urls, starts, ends, on_error="raise")
            return blocks

        return self.attempt(read)

    def blocks(self) -> Iterator[bytes]:
        """Yields the object's bytes in order, `READ_BYTES` at a time."""
        size = self.size()
        for first in range(0, size, READ_BYTES * AT_ONCE):
            starts = range(first, min(first + READ_BYTES * AT_ONCE, size), READ_BYTES)
            yield from self.read_ranges([(at, min(at + READ_BYTES, size)) for at in starts])

    def write(self, content: bytes | str | Parts, exclusive: bool = False) -> None:
        """Writes the object whole. With `exclusive`, raises FileExistsError where there is one.

        Of `Parts` that are large, `PART_BYTES` are in memory for each request in flight.
        Not every storage keeps `exclusive`: `data.lease` checks that it did.
        """
        content = content.encode() if isinstance(content, str) else content
        mode = "create" if exclusive else "overwrite"
        self.attempt(lambda driver: _send(driver, self.url, content, mode))

    def upload(self, file: Path) -> None:
        """Writes the contents of a local file."""
        self.attempt(lambda driver: driver.put_file(str(file), self.url))

    def copy_to(self, other: StoragePath) -> None:
        """Copies the object within its storage, which moves no bytes through this machine."""
        self.attempt(lambda driver: driver.cp_file(self.url, other.url))

    def download(self, file: Path) -> None:
        """Writes the object into a local file."""
        with file.open("wb") as stream:
            for block in self.blocks():
                stream.write(block)

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the object."""
        try:
            self.attempt(lambda driver: driver.rm_file(self.url))
        except FileNotFoundError as error:
            self.require_bucket(error)
            if not missing_ok:
                raise

    def remove_tree(self, which: Callable[[str], bool] = lambda name: True) -> None:
        """Removes the objects below whose names `which` accepts, many in one request."""

        def remove(driver: Any) -> None:
            listed = driver.find(self.url)
            if paths := [path for path in listed if which(path.rsplit("/", 1)[-1])]:
                driver.rm(paths)

        try:
            self.attempt(remove)
        except FileNotFoundError as error:
            self.require_bucket(error)


def _send(driver: Any, url: str, content: bytes | Parts, mode: str) -> None:
    """Writes an object. Raises TimeoutError where that takes too long."""
    if not driver.async_impl:
        driver.pipe_file(url, bytes(content), mode=mode)
        return
    from fsspec.asyn import FSTimeoutError, sync

    limit = WRITE_SECONDS + len(content) / SLOWEST_BYTES
    options = {"mode": mode, "chunksize": PART_BYTES, "timeout": limit}
    if len(content) < 2 * PART_BYTES:  # which drivers send whole
        content = bytes(content)
    try:
        sync(driver.loop, driver._pipe_file, url, content, **options)
    except FSTimeoutError:
        raise TimeoutError(errno.ETIMEDOUT, f"the upload took longer than {limit:.0f} s") from None


AnyPath = Path | StoragePath


def as_path(text: str | Path | StoragePath) -> AnyPath:
    """Returns the path of a local file or of an object. Raises ValueError as `check_url`."""
    if isinstance(text, StoragePath):
        return text
    if isinstance(text, Path):
        return text
    if not is_url(text):
        return Path(text.removeprefix("file://"))
    return StoragePath(check_url(text))


def size_of(path: AnyPath) -> int:
    """Returns the size of a file. Raises OSError. [bytes]"""
    return path.size() if isinstance(path, StoragePath) else path.stat().st_size


def plain_name(path: str) -> str:
    """Returns a driver's path as it stands in a URL: memory's begins with a slash."""
    return path.strip("/")
