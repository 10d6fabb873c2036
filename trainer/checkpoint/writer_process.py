"""The process beside a rank that writes, hashes and publishes its checkpoints.

    python -m trainer.checkpoint.writer_process HANDLE BYTES PARENT

HANDLE is the inherited descriptor of the memory that the rank fills, PARENT the rank's process id.
Requests are lines of JSON on stdin, answers lines on stdout. The process ends with its rank, even
if that is killed: at the end of stdin, and by the kernel's signal. Signals to a job are the rank's
affair and are ignored. It imports no torch and has no connection to other processes: what became of
a rank's files is a file in the checkpoint's temporary folder, and the first rank's process
publishes once all are there.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from data.activity import print_line
from data.held_lease import HeldLease
from data.lease import LeaseError
from data.storage import StoragePath, as_path
from trainer.checkpoint.manifest import FileRecord
from trainer.checkpoint.rank_files import (
    NewCheckpoint,
    publish,
    read_outcomes,
    remove_later,
    remove_outcomes,
    write_file,
    write_outcome,
)
from trainer.checkpoint.store import open_store
from trainer.process.parent import end_with

PIPE_BYTES = 1 << 20
"""Of a request that a rank can send while its process is busy; the system's usual limit."""
POLL_SECONDS = 0.1
STORAGE_POLL_SECONDS = 1.0
"""Between two looks for the other ranks' files, in object storage."""
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class FileInMemory:
    """A file to write: its header, and where in the shared memory its data is."""

    name: str
    header: str
    start: int
    stop: int


@dataclass(frozen=True)
class Request:
    """A checkpoint to write.

    Attributes:
        checkpoints: the folder of all checkpoints.
        step, folder, token: see NewCheckpoint.
        files: those of this rank.
        rank, world_size: of the training.
        state: the contents of state.json for the first rank, which publishes.
        leases: which the run has to hold then.
    """

    checkpoints: str
    step: int
    folder: str
    token: str
    files: list[FileInMemory]
    rank: int
    world_size: int
    state: dict[str, Any] | None
    leases: list[HeldLease] = field(default_factory=list)

    @property
    def new(self) -> NewCheckpoint:
        """The checkpoint."""
        return NewCheckpoint(self.step, as_path(self.folder), self.token)


@dataclass(frozen=True)
class Answer:
    """What has become of a request.

    Attributes:
        event: `written` where all files of this rank are on the disk, `published`, `failed`, or
            `lost` where another process has taken over the run.
        seconds: since the request.
        errno, reason: of a failure.
        rank: whose failure it is.
    """

    event: str
    seconds: float
    errno: int | None = None
    reason: str = ""
    rank: int = 0


class WriterProcess:
    """A rank's handle of its writer, which starts at once.

    `memory`: handle and size of the memory that both share.
    """

    def __init__(self, memory: tuple[int, int]) -> None:
        handle, size = memory
        numbers = map(str, (handle, size, os.getpid()))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainer.checkpoint.writer_process", *numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(handle,),
            pipesize=PIPE_BYTES,
        )
        self._buffer = b""

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def send(self, request: Request) -> None:
        """Sends a request. Raises OSError where the process has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(request)).encode() + b"\n")
        self._process.stdin.flush()

    def abort(self) -> None:
        """Makes the first rank's process give up waiting for other ranks' files."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(b"{}\n")
            self._process.stdin.flush()

    def receive(self, timeout: float | None = 0.0) -> Answer | None:
        """Returns the next answer; None where there is none within `timeout` seconds.

        None waits for it. Raises OSError where the process has ended.
        """
        assert self._process.stdout is not None
        handle = self._process.stdout.fileno()
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if not is_readable(handle, left):
                return None
            received = os.read(handle, 1 << 16)
            if not received:
                raise OSError(None, "the process that writes checkpoints has ended")
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        return Answer(**json.loads(line))

    def close(self, kill: bool = False) -> None:
        """Ends the process, by default after its request."""
        if kill:
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()
        self._process.wait()


def serve(
    memory: memoryview, requests: Iterator[dict[str, Any]], is_aborted: Callable[[float], bool]
) -> None:
    """Answers requests until there are no more."""
    for fields in requests:
        if not fields:
            continue  # an abort that came after the answer
        files = [FileInMemory(**file) for file in fields.pop("files")]
        leases = [HeldLease(**lease) for lease in fields.pop("leases")]
        request = Request(**fields, files=files, leases=leases)
        start = time.monotonic()

        def answer(event: Answer, start: float = start) -> None:
            timed = replace(event, seconds=time.monotonic() - start)
            print(json.dumps(asdict(timed)), flush=True)

        _write(request, memory, answer, is_aborted)


def _write(
    request: Request,
    memory: memoryview,
    answer: Callable[[Answer], None],
    is_aborted: Callable[[float], bool],
) -> None:
    """Writes this rank's files; on the first rank, waits for the others' and publishes."""
    new = request.new
    try:
        records = {
            (path := new.path(file.name)).name: write_file(
                path, file.header, [memory[file.start : file.stop]]
            )
            for file in request.files
        }
        write_outcome(new, request.rank, {"files": records})
    except OSError as error:
        _give_up(new, request)
        reason = error.strerror or type(error).__name__
        with suppress(OSError):
            write_outcome(new, request.rank, {"errno": error.errno, "reason": reason})
        answer(Answer("failed", 0.0, error.errno, reason, request.rank))
        return
    answer(Answer("written", 0.0))
    if request.state is None:
        return
    try:
        failure = _publish(new, request, is_aborted)
    except LeaseError as error:
        failure = Answer("lost", 0.0, None, str(error), request.rank)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        failure = Answer("failed", 0.0, error.errno, reason, request.rank)
    answer(failure or Answer("published", 0.0))


def _give_up(new: NewCheckpoint, request: Request) -> None:
    """Removes this rank's files, which may leave room for its answer."""
    for file in request.files:
        with suppress(OSError):
            new.path(file.name).unlink(missing_ok=True)


def _publish(
    new: NewCheckpoint, request: Request, is_aborted: Callable[[float], bool]
) -> Answer | None:
    """Publishes once all ranks have written; returns the failure of one of them, or None."""
    poll = STORAGE_POLL_SECONDS if isinstance(new.folder, StoragePath) else POLL_SECONDS
    ranks, files = range(request.world_size), dict[str, FileRecord]()
    missing, is_over = set(ranks), False
    while missing:
        for rank, outcome in read_outcomes(new, missing).items():
            if "files" not in outcome:
                return Answer("failed", 0.0, outcome["errno"], outcome["reason"], rank)
            files |= outcome["files"]
            missing.remove(rank)
        if missing and is_over:
            return Answer("failed", 0.0, None, "another rank could not write", min(missing))
        # Then one more look: the rank that failed had left its reason before it said so.
        is_over = bool(missing) and is_aborted(poll)
    remove_outcomes(new, ranks)
    assert request.state is not None
    checkpoints = as_path(request.checkpoints)
    store = open_store(checkpoints)
    publish(new, store, request.leases, files, request.state)
    try:
        remove_later(checkpoints, store, request.leases, request.step)
    except OSError as error:  # the next save tries again
        reason = error.strerror or type(error).__name__
        problem = f"checkpoints after step {request.step} could not be removed: {reason}"
        print_line(f"v4: warning: {checkpoints}: {problem}", sys.stderr)
    return None


class _Requests:
    """The requests on stdin; between two of them, whether one to give up has come."""

    def __init__(self) -> None:
        self._buffer = b""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            while b"\n" not in self._buffer:
                if not self._read():
                    return
            line, _, self._buffer = self._buffer.partition(b"\n")
            yield json.loads(line)

    def is_aborted(self, seconds: float) -> bool:
        """Waits some seconds; whether the rank has sent something, or has ended."""
        if b"\n" in self._buffer or is_readable(0, seconds):
            return b"\n" in self._buffer or not self._read() or b"\n" in self._buffer
        return False

    def _read(self) -> bool:
        received = os.read(0, 1 << 20)
        self._buffer += received
        return bool(received)


def is_readable(handle: int, seconds: float | None) -> bool:
    """Waits for bytes, or the end, of a pipe; `select` fails for descriptors from 1024."""
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(None if seconds is None else 1000 * seconds))


def main() -> None:
    """Serves until the end of stdin."""
    handle, size, parent = map(int, sys.argv[1:])
    end_with(parent)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    requests = _Requests()
    memory = mmap.mmap(handle, size, access=mmap.ACCESS_READ)
    serve(memoryview(memory), iter(requests), requests.is_aborted)


if __name__ == "__main__":
    main()
