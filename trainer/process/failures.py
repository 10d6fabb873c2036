"""A failure on one rank ends all ranks, and is reported once.

Python cannot interrupt a rank that waits inside a collective when another one has failed, and how
long it waits depends on the backend. So each rank has a thread that polls the job's store: the
first rank to fail claims the report there, prints which rank failed, where and why, and writes a
notice, on which the other ranks exit as well.
"""

import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from data.activity import print_line
from trainer.parallel.collectives import all_gather_objects
from trainer.parallel.grid import Grid
from trainer.process.errors import exit_code, explain
from trainer.process.exit_codes import FAILED, error_line

POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0  # for the rank's own error, which says more than that the store is gone
STORE_TIMEOUT = timedelta(seconds=30)


class FailureWatch:
    """Reports a failure of this process, and ends it after a failure of another one."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.store: dist.Store | None = None
        """The job's store, once there are several ranks and they are connected."""
        self.key = ""
        """The prefix of the keys of this attempt."""
        self._closed = threading.Event()
        self.is_ending = False
        """Whether this process is about to end because of a failure."""
        self.at_end: list[Callable[[], None]] = []
        """Called before this process is ended because of a failure."""

    def connect(self, grid: Grid) -> None:
        """Starts to poll; all ranks call it once the process group is up."""
        if self.world_size == 1:
            return
        # torchrun may use one store for all attempts: every attempt has a different key.
        self.key = "v4/" + all_gather_objects(secrets.token_hex(8), grid.world)[0]
        self.store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=STORE_TIMEOUT,
        )
        threading.Thread(target=self._poll, daemon=True).start()

    def close(self) -> None:
        """Stops polling, at the end of a run without a failure."""
        self._closed.set()

    def report(self, error: Exception) -> None:
        """Prints the error if no other rank has failed before, then ends this process.

        The other ranks end when they see the report.

        Returns only in a run of one process. The exit code is that of `errors.exit_code`. The
        process ends at once: destroying the process group would wait for the others.
        """
        if self.world_size == 1:
            return
        self._closed.set()
        sentence, code = explain(error), exit_code(error)
        where = f"rank {self.rank} on {socket.gethostname()}"
        message = f"v4: {where} failed: {type(error).__name__}: {error}"
        if self._claim():
            if sentence is not None:
                message = error_line(sentence, code)
            print_line(message, sys.stderr)
            if sentence is None:
                print_line("".join(traceback.format_exception(error)), sys.stderr)
                ErrorHandler().record_exception(error)  # torchrun shows it as the root cause
            self._write_notice(code, message)
        self._end(code)

    def end_all(self, code: int, message: str, abort: Iterable[int] = ()) -> None:
        """Prints a message and ends all ranks, unless a rank that failed earlier is doing so.

        Processes in `abort`, which cannot read the notice, get SIGABRT: after the message, which
        their end would replace, and before the launcher ends them without their stacks.
        """
        self._closed.set()
        if self._claim():
            print_line(message, sys.stderr)
            ErrorHandler().record_exception(RuntimeError(message))
            self._write_notice(code, message)
        for pid in abort:
            with suppress(OSError):
                os.kill(pid, signal.SIGABRT)
        self._end(code)

    def end_without_store(self, code: int, message: str) -> None:
        """Ends this rank where the store does not answer, as every other rank does.

        The first rank of each host but rank 0 prints the message, before the others end.
        """
        self._closed.set()
        of_first_host = int(os.environ.get("GROUP_RANK", "0")) == 0
        if int(os.environ.get("LOCAL_RANK", "0")) == int(of_first_host):
            print_line(message, sys.stderr)
            ErrorHandler().record_exception(RuntimeError(message))
        else:
            time.sleep(GRACE_SECONDS)
        self._end(code)

    def _claim(self) -> bool:
        """Whether this rank is the first to fail; True where the store does not answer."""
        if self.store is None:
            return True
        try:
            return self.store.add(f"{self.key}/claims", 1) == 1
        except RuntimeError:
            return True

    def _write_notice(self, code: int, message: str) -> None:
        if self.store is None:
            return
        try:
            self.store.set(f"{self.key}/notice", f"{code} {socket.gethostname()} {message}")
        except RuntimeError:
            return  # the store is gone, which ends the others as well

    def _poll(self) -> None:
        """Ends the process when another rank has failed; the body of the thread."""
        assert self.store is not None
        notice = f"{self.key}/notice"
        while not self._closed.wait(POLL_SECONDS):
            try:
                if not self.store.check([notice]):
                    continue
                code, host, message = self.store.get(notice).decode().split(" ", 2)
            except RuntimeError:
                if not self._closed.wait(GRACE_SECONDS):
                    print_line(
                        f"v4: rank {self.rank} on {socket.gethostname()} ends, since the process "
                        "that holds the job's store is gone",
                        sys.stderr,
                    )
                    self._end(FAILED)
                return
            # The first rank's log is where people look.
            if self.rank == 0 and host != socket.gethostname():
                print_line(message, sys.stderr)
            # torchrun names the earliest failure, in whole seconds, as the root cause.
            time.sleep(1.0)
            self._end(int(code))

    def _end(self, code: int) -> None:
        """Ends the process without waiting for threads, process groups or exit handlers."""
        self.is_ending = True
        if self.rank == 0 and self.store is not None:
            time.sleep(2 * POLL_SECONDS)  # the store may live in this process
        for action in self.at_end:
            with suppress(OSError):
                action()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)


@contextmanager
def report_failures() -> Iterator[FailureWatch]:
    """Yields a watch that reports an exception inside the block.

    With several processes the exception ends all of them; with one it is raised.
    """
    watch = FailureWatch()
    ErrorHandler().initialize()  # a crash outside Python shows where it was
    try:
        yield watch
    except Exception as error:
        watch.report(error)
        raise
