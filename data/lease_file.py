"""The file of a lease and what is done with it, on a file system and in object storage.

In object storage a lease is created by a conditional write, and nobody ever writes over it: its
owner's signs of life go into an object of their own. So an owner that was stopped for a while
cannot take a lease back from whoever has taken it over.
"""

import errno
import os
import secrets
import tempfile
import time
from pathlib import Path
from typing import Protocol

from data.storage import AnyPath, StoragePath

SETTLE_SECONDS = 2.0
"""Wait after a write to a storage without conditional writes, until which others write too."""


class LeaseFile(Protocol):
    """The operations; all raise OSError. `marker` names one that a process creates alone."""

    def open_folder(self) -> None:
        """Makes the folder where it is missing."""

    def close_folder(self) -> None:
        """Removes the folder if it was made for the lease and is empty."""

    def folder_id(self) -> tuple[int, int] | None:
        """Identifies the folder, if that is possible."""

    def read(self) -> tuple[str, float] | None:
        """Returns the text and the time of the last sign of life; None without a file."""

    def create(self, text: str) -> bool:
        """Writes the file unless there is one; whether this process did."""

    def renew(self) -> None:
        """Gives a sign of life."""

    def remove(self) -> None:
        """Removes the file."""

    def age(self, time: float) -> float:
        """Returns the seconds since a time, by the clock of the file system."""

    def mark(self, marker: str) -> bool:
        """Creates a marker; whether this process did."""

    def marked_at(self, marker: str) -> float | None:
        """Returns when a marker was created."""

    def unmark(self, marker: str) -> None:
        """Removes a marker."""


def open_lease_file(path: AnyPath) -> LeaseFile:
    """Returns the lease file at `path`."""
    return ObjectLeaseFile(path) if isinstance(path, StoragePath) else LocalLeaseFile(path)


class LocalLeaseFile:
    """A file; its time of modification is the last sign of life."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.parent
        self._is_new_folder = False

    def open_folder(self) -> None:
        """Makes the folder where it is missing."""
        self._is_new_folder = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)

    def close_folder(self) -> None:
        """Removes the folder if it was made for the lease and is empty."""
        if self._is_new_folder and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def folder_id(self) -> tuple[int, int] | None:
        """Returns device and inode of the folder; None where there is none."""
        try:
            stat = self.folder.stat()
        except FileNotFoundError:
            return None
        return stat.st_dev, stat.st_ino

    def read(self) -> tuple[str, float] | None:
        """Returns the text and the time of modification; None without a file."""
        try:
            with self.path.open(encoding="utf-8", errors="replace") as stream:
                return stream.read(), os.fstat(stream.fileno()).st_mtime
        except FileNotFoundError:
            return None

    def create(self, text: str) -> bool:
        """Writes the file unless there is one; whether this process did."""
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def renew(self) -> None:
        """Updates the time of modification."""
        os.utime(self.path)

    def remove(self) -> None:
        """Removes the file."""
        self.path.unlink(missing_ok=True)

    def age(self, time: float) -> float:
        """Returns the difference from the time of a file written now."""
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=f".{self.path.name}.") as probe:
            return os.fstat(probe.fileno()).st_mtime - time

    def mark(self, marker: str) -> bool:
        """Creates a marker; whether this process did."""
        try:
            os.close(os.open(self._marker(marker), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def marked_at(self, marker: str) -> float | None:
        """Returns when a marker was created."""
        try:
            return self._marker(marker).stat().st_mtime
        except FileNotFoundError:
            return None

    def unmark(self, marker: str) -> None:
        """Removes a marker."""
        self._marker(marker).unlink(missing_ok=True)

    def _marker(self, marker: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{marker}")


class ObjectLeaseFile:
    """An object, and another one that is written at every sign of life."""

    def __init__(self, path: StoragePath, settle: float = SETTLE_SECONDS) -> None:
        self.path = path
        self.settle = settle
        self._alive = self._beside("alive")

    def open_folder(self) -> None:
        """Does nothing: there are no folders."""

    def close_folder(self) -> None:
        """Removes the object with the signs of life."""
        self._alive.unlink(missing_ok=True)

    def folder_id(self) -> tuple[int, int] | None:
        """Returns None: a folder cannot be moved."""
        return None

    def read(self) -> tuple[str, float] | None:
        """Returns the text and the time of the last sign of life; None without the object."""
        try:
            text = self.path.read_bytes().decode(errors="replace")
        except FileNotFoundError:
            return None
        times = [one.modified() for one in (self.path, self._alive)]
        return text, max((at for at in times if at is not None), default=0.0)

    def create(self, text: str) -> bool:
        """Writes the object unless there is one; whether this process did.

        A second conditional write shows whether the storage keeps the condition. Where it does not,
        the last writer has the lease.
        """
        if not self._create(self.path, text):
            return False
        if not self._overwrites(text):
            return True
        time.sleep(self.settle)
        return self.path.read_text() == text

    def _create(self, path: StoragePath, text: str) -> bool:
        try:
            path.write(text, exclusive=True)
        except FileExistsError:
            return path.read_text() == text  # of an attempt whose answer was lost
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            if path.is_file():
                return False
            path.write(text)
        return True

    def _overwrites(self, text: str) -> bool:
        """Whether the storage writes over an object although the write is conditional."""
        try:
            self.path.write(text, exclusive=True)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
        return True

    def renew(self) -> None:
        """Writes the other object."""
        self._alive.write("")

    def remove(self) -> None:
        """Removes the object."""
        self.path.unlink(missing_ok=True)

    def age(self, time: float) -> float:
        """Returns the difference from the time of an object written now."""
        probe = self._beside(secrets.token_hex(8))
        probe.write("")
        try:
            return (probe.modified() or time) - time
        finally:
            probe.unlink(missing_ok=True)

    def mark(self, marker: str) -> bool:
        """Creates a marker; whether this process did."""
        return self._create(self._beside(marker), secrets.token_hex(8))

    def marked_at(self, marker: str) -> float | None:
        """Returns when a marker was created."""
        return self._beside(marker).modified()

    def unmark(self, marker: str) -> None:
        """Removes a marker."""
        self._beside(marker).unlink(missing_ok=True)

    def _beside(self, name: str) -> StoragePath:
        return self.path.with_name(f".{self.path.name}.{name}")
