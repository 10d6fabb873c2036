"""Starts the training processes and passes signals on to them."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import IO

import psutil

ERROR_PREFIX = "v4: error: "
USER_ERROR = 2
_POLL_SECONDS = 0.2

# For torchrun, wherever it may have to restart. Without it, torch 2.13's agents keep one store for
# all attempts: workers find the addresses of dead ones in it, and a host that was replaced waits
# for an entry that nobody writes again.
RESTART_ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def command(verb: str, *arguments: str) -> list[str]:
    """The subprocess that does `verb` of trainer.commands."""
    return [sys.executable, "-m", "trainer.commands", verb, *arguments]


def training_command(arguments: Sequence[str], processes: int, restarts: int = 0) -> list[str]:
    """The subprocess that trains: plain for one process, torchrun for several on this machine.

    Restarts are torchrun's, too: after a crash it starts all processes again, up to that often.
    """
    python = [sys.executable, "-m"]
    if not _needs_torchrun(processes, restarts):
        return [*python, "trainer", *arguments]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    torchrun += ["--max-restarts", str(restarts)]
    return [*python, *torchrun, "-m", "trainer", *arguments]


def _needs_torchrun(processes: int, restarts: int) -> bool:
    return processes > 1 or restarts > 0


def run(arguments: Sequence[str]) -> int:
    """Run a subprocess to its end; returns its exit code."""
    with subprocess.Popen(arguments, env=environment(1)) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                pass  # the subprocess got it, too, and decides


def train(arguments: Sequence[str], processes: int, restarts: int = 0) -> int:
    """Train to the end, or to the checkpoint that follows SIGTERM, SIGINT or SIGHUP.

    A second signal kills the training. After a crash it starts again from the newest checkpoint,
    at most `restarts` times. Returns 0, 2 after one line on stderr about bad input, or what the
    training processes returned.
    """
    training = _Training(arguments, processes, restarts)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    old = {number: signal.signal(number, training.on_signal) for number in numbers}
    try:
        return training.wait()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class _Training:
    """One process, or torchrun and its workers, in a session of their own.

    Apart from the terminal's process group, Ctrl-C reaches only this process, which asks the
    workers to stop. torchrun itself is left out: it would give them 30 seconds and then fail.
    """

    def __init__(self, arguments: Sequence[str], processes: int, restarts: int) -> None:
        self.with_torchrun = _needs_torchrun(processes, restarts)
        self.may_restart = restarts > 0
        self.signals = 0
        self.asked: set[int] = set()
        self.process = subprocess.Popen(
            training_command(arguments, processes, restarts),
            env=environment(processes),
            start_new_session=True,
            stderr=subprocess.PIPE if self.with_torchrun else None,
            text=True,
        )
        self.errors = _ErrorFilter(self.process.stderr)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Handler: the first signal asks, the second one kills."""
        self.signals += 1

    def wait(self) -> int:
        """The exit code of the whole."""
        while True:
            try:
                code = self.process.wait(timeout=_POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                if self.signals > 1 or (self.may_restart and self.errors.found):
                    self._kill()  # what the user has to mend is the same at every restart
                elif self.signals == 1:
                    self._ask()
        self.errors.join()
        return USER_ERROR if self.errors.found else code

    def _ask(self) -> None:
        """Ask every worker once; later ones, too, if torchrun is still starting them."""
        for worker in self._workers():
            if worker.pid not in self.asked:
                self.asked.add(worker.pid)
                with suppress(psutil.NoSuchProcess):
                    worker.terminate()

    def _kill(self) -> None:
        for worker in [psutil.Process(self.process.pid), *self._workers()]:
            with suppress(psutil.NoSuchProcess):
                worker.kill()

    def _workers(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return parent.children() if self.with_torchrun else [parent]


class _ErrorFilter:
    """Passes stderr on, but of a user's error only the sentence, once.

    Every rank says it, and torchrun adds a page about ranks that ended with an exit code.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self.found = False
        self._thread: threading.Thread | None = None
        if stream is not None:
            self._thread = threading.Thread(target=self._pass_on, args=(stream,), daemon=True)
            self._thread.start()

    def _pass_on(self, stream: IO[str]) -> None:
        for line in stream:
            if not self.found:
                print(line, end="", file=sys.stderr, flush=True)
                self.found = line.startswith(ERROR_PREFIX)

    def join(self) -> None:
        """Wait for the last line."""
        if self._thread is not None:
            self._thread.join()


def environment(processes: int) -> dict[str, str]:
    """Share the cores between the processes, unless the user has said how many threads to use."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    return {"OMP_NUM_THREADS": str(threads), **RESTART_ENVIRONMENT, **os.environ}
