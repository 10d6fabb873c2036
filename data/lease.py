"""A lease on a folder, so that only one process at a time works in it.

`lease.json` in the folder names its owner, which renews the file's time of modification every
`RENEW_SECONDS`. A lease is taken over from an owner that is dead:

- on this machine, as soon as its process is gone;
- on another one, when the file has not been renewed for `STALE_SECONDS`; for two renewals if it is
  of the same launch, whose launcher has ended the earlier attempt, or its host is gone.

The age of the file is its difference from a file written now, so that both times come from the same
file system, and no owner is taken for dead before the file has been watched for two renewals
without a change: clocks that differ between hosts can delay a takeover, and cannot cause one.

A folder that was moved or removed keeps its owner, which learns so from `check` as well: what it
writes from then on would go into a new folder of that name.

In object storage (lease_file.py) the same holds, with an object's time instead of a file's.

An owner that could not renew its lease in time, and lost it, learns so from `check`, which it calls
before it writes; whatever is published asks the file itself (held_lease.py).
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data.activity import print_line
from data.errors import DataError
from data.lease_file import open_lease_file
from data.processes import birth, find_process
from data.storage import AnyPath, StoragePath

LEASE_FILE = "lease.json"
RENEW_SECONDS = 10.0
STALE_SECONDS = 120.0
_POLL = 0.2  # of the time between renewals


class LeaseError(DataError):
    """A folder in which another process works."""


class LeaseStopped(Exception):
    """A wait for a lease that a signal has ended; nothing was begun."""


class Owner(BaseModel):
    """Who holds a lease, as the file has it.

    Attributes:
        work: the command.
        machine: differs between boots and between containers with their own process ids.
        born: when the process was created, in seconds since the boot, or since 1970 in older files.
        launch: the job of a process that a launcher may restart on another host; else empty.
        folder: where the lease was taken; the copy of a folder has the original's.
        started: in UTC.
        token: differs between any two leases.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    work: str
    host: str
    machine: str
    pid: int
    born: float
    launch: str
    folder: str
    started: str
    token: str = Field(pattern="^[0-9a-f]+$")

    @classmethod
    def current(cls, work: str, folder: AnyPath, launch: str) -> "Owner":
        """This process."""
        return cls(
            work=work,
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            born=birth(os.getpid()),
            launch=launch,
            folder=str(folder.resolve() if isinstance(folder, Path) else folder),
            started=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            token=secrets.token_hex(8),
        )

    @classmethod
    def parse(cls, text: str) -> "Owner | None":
        """The owner in a lease file; None for a file that is not written yet, or damaged."""
        try:
            return cls.model_validate_json(text)
        except ValidationError:
            return None


@dataclass(frozen=True)
class _File:
    """The lease file at one moment; `owner` is None if it has none."""

    owner: Owner | None
    mtime: float


class Lease:
    """The lease on `folder`, which is made where it is missing; a context that holds it.

    Arguments:
        work: the command, which others show.
        launch: job of the launcher that started this process. Of an owner of the same job, which
            may be about to end, the end is waited for.
        name: of the lease file.
        renew, stale: seconds, the same for all that use the folder.
        log: called with a line before a wait.
        is_stopped: whether a signal ends the wait.
    """

    def __init__(
        self,
        folder: AnyPath,
        work: str,
        launch: str = "",
        name: str = LEASE_FILE,
        renew: float = RENEW_SECONDS,
        stale: float = STALE_SECONDS,
        log: Callable[[str], None] = print_line,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.folder, self.path = folder, folder / name
        self._file = open_lease_file(self.path)
        self.renew, self.stale, self.log = renew, stale, log
        self.is_stopped = is_stopped
        self.owner = Owner.current(work, folder, launch)
        self._loss: LeaseError | None = None
        self._identity: tuple[int, int] | None = None
        self._is_gone = self._has_moved = False
        self._renewed = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> "Lease":
        """Takes the lease. Raises LeaseError if another process has it, or the folder is read-only.

        Waits for up to `stale` seconds to learn whether an owner on another machine is alive.
        Raises LeaseStopped where `is_stopped` ends the wait.
        """
        try:
            self._file.open_folder()
            self._identity = self._file.folder_id()
            while not self._create():
                self._outlive_owner()
        except OSError as error:
            raise LeaseError(f"cannot write {self.path}: {error.strerror}.") from error
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def release(self) -> None:
        """Ends the lease; a folder that was made for it and is empty is removed.

        A storage that is away ends nothing: the lease then ends by its age.
        """
        self._closed.set()
        self._thread.join(timeout=1.0)  # it would write the file again
        try:
            file = self._read()
            if file is None or file.owner != self.owner:
                return
            self._file.remove()
            self._file.close_folder()
        except OSError as error:
            if isinstance(self.path, Path):
                raise
            self.log(f"warning: {self.path} could not be removed: {error.strerror}")

    def check(self) -> None:
        """Raises LeaseError if another process has taken the lease over.

        Logs once where the folder is not there any more.
        """
        if self._is_gone:
            self._is_gone = False
            self.log(
                f"warning: {self.folder} has been moved or removed since the start; this process "
                "continues, and what it saves goes into a new folder of that name, to be moved to "
                "the rest"
            )
        if self._loss is not None:
            raise self._loss

    def _renew(self) -> None:
        """The body of the thread."""
        while not self._closed.wait(self.renew):
            try:
                if self._identity is not None and self._file.folder_id() != self._identity:
                    self._identity, self._is_gone, self._has_moved = None, True, True
                file = self._read()
                if file is None and self._may_have_ended_for_another:
                    self._loss = taken_over(self.path, None)
                elif file is None:  # removed by hand
                    self._create()
                elif file.owner == self.owner:
                    self._file.renew()
                elif file.owner is not None:
                    self._loss = taken_over(self.path, file.owner)
                if self._loss is not None:
                    return
                self._renewed = time.monotonic()
            except OSError:
                continue  # a file system that fails for a while; who takes over is seen later

    @property
    def _may_have_ended_for_another(self) -> bool:
        """Whether another process can have taken a lease that is not there, and ended since."""
        return not self._has_moved and time.monotonic() - self._renewed > 2 * self.renew

    def _read(self) -> _File | None:
        file = self._file.read()
        return None if file is None else _File(Owner.parse(file[0]), file[1])

    def _create(self) -> bool:
        """Writes the file unless there is one; whether this process owns it."""
        return self._file.create(self._text())

    def _text(self) -> str:
        return self.owner.model_dump_json(indent=1) + "\n"

    def _outlive_owner(self) -> None:
        """Removes the file of a dead owner. Raises LeaseError if the owner is alive."""
        first = self._read()
        if first is None:
            return
        owner, last = first.owner, first
        is_here = owner is not None and owner.machine == self.owner.machine
        is_patient = owner is not None and owner.launch == self.owner.launch != ""
        confirm = 2 * self.renew
        quiet = (
            confirm if is_patient else max(self.stale - max(self._age(first.mtime), 0.0), confirm)
        )
        start = renewed = time.monotonic()
        has_logged = False
        while True:
            now = time.monotonic()
            is_dead = _is_dead(owner, self.folder) if is_here else now - renewed >= quiet
            if is_dead:
                self._remove(last)
                return
            is_alive = is_here or last is not first
            if is_alive and not (is_patient and now - start < self.stale):
                raise self._refusal(last)
            if not has_logged:
                has_logged = True
                self.log(
                    f"{self.folder}: waiting for up to {self.stale:.0f} s to learn whether "
                    f"{_name(owner)} is still working here"
                )
            time.sleep(min(_POLL * self.renew, 1.0))
            if self.is_stopped():
                raise LeaseStopped(f"{self.folder}: stopped in this wait")
            file = self._read()
            if file is None or file.owner != owner:
                return
            if file != last:
                last, renewed = file, time.monotonic()
                quiet = confirm if is_patient else self.stale

    def _refusal(self, file: _File) -> LeaseError:
        owner = file.owner
        since = "" if owner is None else f" since {owner.started}"
        return LeaseError(
            f"{self.folder}: {_name(owner)} has been working here{since}, and was active "
            f"{max(self._age(file.mtime), 0.0):.0f} s ago; wait for its end, or stop it."
        )

    def _age(self, mtime: float) -> float:
        """Seconds since a sign of life, by the clock of the file system."""
        return self._file.age(mtime)

    def _remove(self, dead: _File) -> None:
        """Removes the file of a dead owner; of several processes that do, one at a time.

        Only who has created the marker of this owner may remove its file, and looks again before:
        the file of an owner that has replaced it stays.
        """
        marker = "unreadable" if dead.owner is None else dead.owner.token
        if not self._file.mark(marker):
            time.sleep(min(_POLL * self.renew, 1.0))
            marked = self._file.marked_at(marker)
            if marked is not None and self._age(marked) > 2 * self.renew:
                self._file.unmark(marker)  # of a process that died in between
            return
        try:
            file = self._read()
            if file is not None and file.owner == dead.owner:
                self._file.remove()
        finally:
            self._file.unmark(marker)


def _is_dead(owner: Owner | None, folder: AnyPath) -> bool:
    """Whether an owner on this machine does not work in `folder`: its process has ended.

    Or its lease was taken in another folder, which was then copied.
    """
    if owner is None:
        return False
    if find_process(owner.pid, owner.born) is None:
        return True
    if isinstance(folder, StoragePath):
        return owner.folder != str(folder)
    try:
        return not os.path.samefile(owner.folder, folder)
    except OSError:
        return False  # the folder was renamed since


def taken_over(path: AnyPath, owner: Owner | None) -> LeaseError:
    """Returns the error of a process whose lease, a file at `path`, is another's by now.

    `owner` is None where that one has ended.
    """
    who = "another process" if owner is None else _name(owner)
    return LeaseError(
        f"{path.parent}: {who} has taken the folder over, since this process did not renew "
        f"{path.name} in time; this one ends."
    )


def _name(owner: Owner | None) -> str:
    if owner is None:
        return "a process with an unreadable lease"
    return f"`{owner.work}` (process {owner.pid} on {owner.host})"


def _machine() -> str:
    """Identifies the space of process ids: the boot and, in a container, its namespace."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not (boot.is_file() and namespace.is_symlink()):
        return socket.gethostname()  # not Linux
    return f"{boot.read_text(encoding='ascii').strip()} {os.readlink(namespace)}"
