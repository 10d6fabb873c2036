"""A failure on one rank ends all ranks, and is told once.

A rank that waits inside a collective cannot be told by Python's means that another one has failed,
and how long it waits depends on the backend. So each rank keeps a thread that looks into the
job's store: the first rank to fail claims the right to speak there, says which rank it is, where
and why, and leaves a note at whose sight the others end, too.
"""

import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from trainer.errors import USER_ERRORS
from trainer.exit_codes import FAILED, USER_ERROR, error_line
from trainer.parallel.collectives import gather_objects
from trainer.parallel.grid import Grid

POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0  # in which a rank may find out itself, and say more, that the store has gone
STORE_TIMEOUT = timedelta(seconds=30)


class FailureWatch:
    """What this process says of its own failure, and its ear for the failures of others."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._store: dist.TCPStore | None = None
        self._key = ""
        self._over = threading.Event()

    def connect(self, grid: Grid) -> None:
        """Start to listen; all ranks call it once the process group is up."""
        if self.world_size == 1:
            return
        # torchrun may keep one store for all attempts: every attempt has a name of its own.
        self._key = "v4/" + gather_objects(secrets.token_hex(8), grid.world)[0]
        self._store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=STORE_TIMEOUT,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        """Stop to listen, at a good end."""
        self._over.set()

    def tell(self, error: Exception) -> None:
        """Speak if no other rank has failed before, then end this process and the others.

        Returns only in a run of one process. The exit code is 2 for a user's error, else 1. The
        process ends at once: taking the process group down would wait for the others.
        """
        if self.world_size == 1:
            return
        self._over.set()
        mistake = isinstance(error, USER_ERRORS)
        code = USER_ERROR if mistake else FAILED
        where = f"rank {self.rank} on {socket.gethostname()}"
        said = f"v4: {where} failed: {type(error).__name__}: {error}"
        if self._claim():
            if mistake:
                print(error_line(error), file=sys.stderr)
            else:
                print(said, file=sys.stderr)
                traceback.print_exception(error)
                ErrorHandler().record_exception(error)  # torchrun shows it as the root cause
            sys.stderr.flush()
            self._leave_note(code, error_line(error) if mistake else said)
        self._end(code)

    def _claim(self) -> bool:
        """Whether this rank is the first to fail; yes where the store does not answer."""
        if self._store is None:
            return True
        try:
            return self._store.add(f"{self._key}/claims", 1) == 1
        except RuntimeError:
            return True

    def _leave_note(self, code: int, said: str) -> None:
        if self._store is None:
            return
        try:
            self._store.set(f"{self._key}/note", f"{code} {socket.gethostname()} {said}")
        except RuntimeError:
            return  # the store has gone, and that ends the others, too

    def _listen(self) -> None:
        """Body of the thread: end the process when another rank has failed."""
        assert self._store is not None
        note = f"{self._key}/note"
        while not self._over.wait(POLL_SECONDS):
            try:
                if not self._store.check([note]):
                    continue
                code, host, said = self._store.get(note).decode().split(" ", 2)
            except RuntimeError:
                if not self._over.wait(GRACE_SECONDS):
                    print(
                        f"v4: rank {self.rank} on {socket.gethostname()} ends, since the process "
                        "that kept the job together has gone",
                        file=sys.stderr,
                    )
                    self._end(FAILED)
                return
            # The first rank's log is where people look.
            if self.rank == 0 and host != socket.gethostname():
                print(said, file=sys.stderr)
            # torchrun names the earliest failure, in whole seconds, as the root cause.
            time.sleep(1.0)
            self._end(int(code))

    def _end(self, code: int) -> None:
        """End the process without waiting for threads, process groups or exit handlers."""
        if self.rank == 0 and self._store is not None:
            time.sleep(2 * POLL_SECONDS)  # the store may live in this process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def report_failures() -> Iterator[FailureWatch]:
    """A watch that speaks about an exception inside the block.

    In a run of several processes the block's exceptions end the process; alone, they are raised.
    """
    watch = FailureWatch()
    ErrorHandler().initialize()  # a crash outside Python shows where it was
    try:
        yield watch
    except Exception as error:
        watch.tell(error)
        raise
