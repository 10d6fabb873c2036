"""Whether the files of all shards are there, by listing their folders once in a thread.

Without it a run would find a missing shard when it first reads a document of it, perhaps after
weeks.
"""

import os
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from data.errors import DataError
from data.storage import AnyPath, StoragePath

_AGAIN = "make the shards again with `v4 data prepare CONFIG`."


class ExpectedFile(NamedTuple):
    """A file by its name below the folder of the shards; `size` in bytes, None where unknown."""

    name: str
    size: int | None


class PresenceCheck:
    """Lists the folders of `files()` below `root` in a thread, from `begin` on."""

    def __init__(self, root: AnyPath, files: Callable[[], Sequence[ExpectedFile]]) -> None:
        self._root, self._files = root, files
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def begin(self) -> None:
        """Starts the thread, if it has not been started."""
        if self._thread.ident is None:
            self._thread.start()

    def wait(self) -> None:
        """Waits for the result. Raises DataError as `raise_problem`."""
        self.begin()
        self._thread.join()
        self.raise_problem()

    def raise_problem(self) -> None:
        """Raises DataError where a file is missing, or has another size, as far as is known."""
        if self._problem is not None:
            raise DataError(self._problem)

    def _run(self) -> None:
        try:
            self._problem = first_problem(self._root, self._files())
        except OSError as error:
            self._problem = f"{self._root} cannot be listed: {error.strerror or error}."


def first_problem(root: AnyPath, files: Sequence[ExpectedFile]) -> str | None:
    """A sentence about the first file that is missing or has another size; None without one."""
    sizes: dict[str, dict[str, int]] = {}
    for file in files:
        parent, _, name = file.name.rpartition("/")
        if parent not in sizes:
            sizes[parent] = sizes_in(root / parent if parent else root)
        size = sizes[parent].get(name)
        if size is None:
            return f"{root / file.name} does not exist; {_AGAIN}"
        if file.size is not None and size != file.size:
            return f"{root / file.name} has {size} bytes instead of {file.size}; {_AGAIN}"
    return None


def sizes_in(folder: AnyPath) -> dict[str, int]:
    """The bytes of each file in a folder, by name; empty where there is no folder."""
    if isinstance(folder, StoragePath):
        return folder.sizes()
    try:
        entries = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    with entries:
        return {entry.name: _size(entry) for entry in entries}


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # a link that leads nowhere
        return -1
