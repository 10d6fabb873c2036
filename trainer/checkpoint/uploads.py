"""Sends the files that torch.distributed.checkpoint writes to object storage.

torch hands over each file's bytes in one piece: they are hashed and sent from memory, so that
nothing is on a local disk, and an attempt that fails can be repeated.
"""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem

from data.storage import StoragePath
from trainer.checkpoint.manifest import FileRecord


class Uploads(FileSystem):
    """A folder in object storage, as torch's writer wants it.

    Attributes:
        records: size and SHA-256 of every file that was sent, by name.
    """

    def __init__(self, folder: StoragePath) -> None:
        self.folder = folder
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        """Yields a stream; what was written to it is sent after the block."""
        assert isinstance(path, StoragePath)
        stream = _Parts()
        yield stream
        content = stream.parts[0] if len(stream.parts) == 1 else b"".join(stream.parts)
        path.write(content)
        digest = hashlib.sha256(content).hexdigest()
        self.records[path.name] = {"size": len(content), "sha256": digest}

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> Any:
        """Returns the place of a file."""
        return self.folder / suffix

    def mkdir(self, path: Any) -> None:
        """Does nothing: there are no folders."""

    def exists(self, path: Any) -> bool:
        """Whether there is a file: never, since the folder was emptied."""
        return False


class _Parts(io.RawIOBase):
    """Keeps what is written, without a copy."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return sum(map(len, self.parts))

    def write(self, content: Any) -> int:
        self.parts.append(content if isinstance(content, bytes) else bytes(content))
        return len(content)
