"""An object as a file that is open for reading."""

import errno
import io
import os
from typing import Any

from data.storage.path import StoragePath
from data.storage.search import describe

_RANGE_BYTES = 4 << 20  # of a request
_FIRST_BYTES = 256 << 10  # that are read ahead at a new place
_MAX_BYTES = 16 << 20  # that are read ahead, and in memory


class RangeReader(io.RawIOBase):
    """Reads an object in ranges of bytes, ahead and concurrently, each repeated where it fails.

    At a new place it reads little ahead, and twice as much with each window that follows.

    Arguments:
        path: the object.
        size: of the object; requested where it is not known. [bytes]
    """

    def __init__(self, path: StoragePath, size: int | None = None) -> None:
        self._path = path
        self._size = describe(path).size if size is None else size
        self._position = 0
        self._window, self._window_start = b"", 0
        self._ahead = 0

    @property
    def name(self) -> str:
        """The URL."""
        return self._path.url

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Returns the place of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a place and returns it."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise OSError(errno.EINVAL, "a negative place in a file", self.name)
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer` with the next bytes; returns their number, 0 at the end."""
        if self._position >= self._size or not len(buffer):
            return 0
        offset = self._position - self._window_start
        if not 0 <= offset < len(self._window):
            self._fetch(len(buffer))
            offset = 0
        part = self._window[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _fetch(self, size: int) -> None:
        """Reads the window that begins at the position, of `size` bytes or more."""
        is_next = self._position == self._window_start + len(self._window)
        self._ahead = min(2 * self._ahead, _MAX_BYTES) if is_next and self._ahead else _FIRST_BYTES
        end = min(self._position + min(max(size, self._ahead), _MAX_BYTES), self._size)
        starts = range(self._position, end, _RANGE_BYTES)
        ranges = [(start, min(start + _RANGE_BYTES, end)) for start in starts]
        self._window = b"".join(self._path.read_ranges(ranges))
        self._window_start = self._position
        if len(self._window) != end - self._position:
            raise OSError(
                errno.EREMOTEIO,
                f"returned {len(self._window)} of the bytes {self._position} to {end}; it changed "
                "while it was read, or its server does not read parts of files",
                self.name,
            )
