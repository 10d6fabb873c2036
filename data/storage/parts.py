"""The bytes of an object that is put together while it is sent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class Parts:
    """Several buffers, one after another; a slice is copied only when it is taken.

    Drivers slice what they upload in parts, so that only the parts in flight are in memory twice.
    """

    def __init__(self, buffers: Iterable[bytes | memoryview]) -> None:
        self._views = [memoryview(buffer) for buffer in buffers]
        self._size = sum(len(view) for view in self._views)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[memoryview]:
        """Yields the buffers."""
        return iter(self._views)

    def __getitem__(self, part: slice) -> bytes:
        """Returns the bytes of a slice with a start."""
        start, stop, _ = part.indices(self._size)
        pieces = []
        for view in self._views:
            if start < len(view) and stop > 0:
                pieces.append(view[max(start, 0) : stop])
            start, stop = start - len(view), stop - len(view)
        return b"".join(pieces)

    def __bytes__(self) -> bytes:
        return b"".join(self._views)
