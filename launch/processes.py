"""Starts the training processes and forwards signals to them."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO

import psutil

from data.activity import print_line
from data.processes import is_running, send_if_handled
from trainer.process.exit_codes import (
    ERROR_PREFIX,
    INTERRUPTED_LINE,
    USER_ERROR,
    describe_signal,
    error_line,
    exit_code_of,
)
from trainer.process.signals import PROFILE_SIGNAL

Handler = Callable[[int, FrameType | None], None]
STOP_SIGNALS: tuple[int, ...] = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
    signal.SIGUSR2,  # as schedulers send before a time limit
)
_OF_A_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables of a shell inside a job, in which one process would wait for the others."""
_POLL_SECONDS = 0.2
_LAST_LINE_SECONDS = 10.0
_END_SECONDS = 15.0

# For torchrun wherever it may restart. Without it, torch 2.13's agents share one store between all
# attempts: workers read the addresses of dead workers from it, and a replaced host waits for an
# entry that is never written again.
RESTART_ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def command(verb: str, *arguments: str) -> list[str]:
    """Returns the command line for `verb` of trainer.commands."""
    return [sys.executable, "-m", "trainer.commands", verb, *arguments]


def training_command(arguments: Sequence[str], processes: int, restarts: int = 0) -> list[str]:
    """Returns the command line for training: plain, or torchrun for several processes or restarts.

    After a crash torchrun restarts all processes, at most `restarts` times.
    """
    if not _needs_torchrun(processes, restarts):
        return [sys.executable, "-m", "trainer", *arguments]
    return _torchrun(["trainer", *arguments], processes, restarts)


def _torchrun(module: Sequence[str], processes: int, restarts: int = 0) -> list[str]:
    """Returns the command line that runs a module, with its arguments, as several processes."""
    torchrun = ["trainer.process.torchrun", "--standalone", "--nproc-per-node", str(processes)]
    torchrun += ["--max-restarts", str(restarts)]
    return [sys.executable, "-m", *torchrun, "-m", *module]


def _needs_torchrun(processes: int, restarts: int) -> bool:
    return processes > 1 or restarts > 0


def run(arguments: Sequence[str]) -> int:
    """Runs a verb's command and returns its exit code. SIGTERM and SIGHUP end it as well.

    Ctrl-C reaches the subprocess too, which decides.
    """
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in started:
            process.send_signal(number)

    def ignore(number: int, frame: FrameType | None) -> None:
        pass

    with handlers({signal.SIGTERM: pass_on, signal.SIGHUP: pass_on, signal.SIGINT: ignore}):
        # Blocked until the subprocess has a handler, see trainer.process.signals.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        alone = {name: x for name, x in environment(1).items() if name not in _OF_A_JOB}
        process = subprocess.Popen(arguments, env=alone)
        started.append(process)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return finish(process.wait(), f"v4 {arguments[3]}")


def run_together(processes: int, verb: str, *arguments: str) -> int:
    """Runs a verb as several processes that share a model, and returns the exit code.

    Any signal ends all of them at once, as they have nothing to save.
    """
    if processes == 1:
        return run(command(verb, *arguments))
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.extend([number] * 2)

    line = _torchrun(["trainer.commands", verb, *arguments], processes)
    with handlers(dict.fromkeys((*STOP_SIGNALS, signal.SIGQUIT), receive)):
        code = _Training(line, processes, 0, received, []).wait()
    if not received:
        return code
    if received[0] == signal.SIGINT:
        print(flush=True)  # the end of a line that has begun
        print_line(INTERRUPTED_LINE, sys.stderr)
    return exit_code_of(-received[0])


def finish(returncode: int, what: str) -> int:
    """Returns the exit code for a subprocess's return code; reports the signal that killed it."""
    if returncode == -signal.SIGINT:  # it had no handler at that moment
        print_line(INTERRUPTED_LINE, sys.stderr)
    elif returncode < 0:
        print_line(error_line(f"{what} {describe_signal(returncode)}"), sys.stderr)
    return exit_code_of(returncode)


@contextmanager
def handlers(new: Mapping[int, Handler]) -> Iterator[None]:
    """Handles signals inside the block; restores the old handlers afterwards.

    SIGHUP stays ignored where nohup has it ignored. SIGINT does not: shells ignore it for the
    background jobs of a script, which `kill -INT` should stop nevertheless.
    """
    is_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    old = {
        number: signal.signal(number, handler)
        for number, handler in new.items()
        if not (is_nohup and number == signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def train(
    arguments: Sequence[str],
    processes: int,
    restarts: int = 0,
    is_enough: Callable[[], bool] = lambda: False,
) -> int:
    """Trains to the last step, or to the checkpoint that follows one of `STOP_SIGNALS`.

    Once `is_enough()`, it stops as after SIGTERM. A second signal, or SIGQUIT, kills the training;
    PROFILE_SIGNAL goes to its processes. After a crash it restarts from the newest checkpoint, at
    most `restarts` times. Returns 0, 2 after one line on stderr about bad input, or the exit code
    of the training processes, 128 + n where signal n killed one.
    """
    received: list[int] = []  # from before the start, else a signal could leave the training alone

    def receive(number: int, frame: FrameType | None) -> None:
        received.extend([number] * (2 if number == signal.SIGQUIT else 1))

    profiles: list[int] = []

    def receive_profile(number: int, frame: FrameType | None) -> None:
        profiles.append(number)

    new = dict.fromkeys((*STOP_SIGNALS, signal.SIGQUIT), receive)
    with handlers({**new, PROFILE_SIGNAL: receive_profile}):
        line = training_command(arguments, processes, restarts)
        return _Training(line, processes, restarts, received, profiles).wait(is_enough)


class _Training:
    """One process, or torchrun and its workers, in a separate session.

    Outside the terminal's process group, Ctrl-C reaches only this process, which sends SIGTERM to
    the workers. torchrun itself gets no signal: it would give them 30 seconds and then fail.

    Arguments:
        command: its command line.
        received: signals so far; the first one stops the training, the second one kills it.
        profiles: signals that ask for a profile, until they have been passed on.
    """

    def __init__(
        self,
        command: Sequence[str],
        processes: int,
        restarts: int,
        received: Sequence[int],
        profiles: list[int],
    ) -> None:
        self.with_torchrun = _needs_torchrun(processes, restarts)
        if self.with_torchrun:  # it takes seconds before a process has its first line
            print_line(f"v4: starting {processes} processes", sys.stderr)
        self.may_restart = restarts > 0
        self.deadline: float | None = None  # for the end after a user's error
        self.received, self.profiles = received, profiles
        self.terminated: set[psutil.Process] = set()
        self.workers: set[psutil.Process] = set()
        self.process = subprocess.Popen(
            command,
            env=environment(processes),
            start_new_session=True,
            stderr=subprocess.PIPE if self.with_torchrun else None,
            encoding="utf-8",
            errors="replace",
        )
        self.errors = _ErrorFilter(self.process.stderr)

    def wait(self, is_enough: Callable[[], bool] = lambda: False) -> int:
        """Waits for the training and returns its exit code; ends it once `is_enough()`."""
        while self._is_running():
            if len(self.received) > 1 or self._restarts_after_error():
                self._kill()
            elif (
                self.received
                or self.process.poll() is not None  # workers without torchrun
                or is_enough()
            ):
                self._terminate()
            while self.profiles:
                self.profiles.pop()
                for worker in self.workers:
                    send_if_handled(worker, PROFILE_SIGNAL)
        self.errors.join()
        if self.errors.has_error:
            return USER_ERROR
        code, was_killed = self.process.wait(), len(self.received) > 1
        return exit_code_of(code) if was_killed else finish(code, "the training process")

    def _restarts_after_error(self) -> bool:
        """Whether the training has outlived a user's error, which is the same after every restart.

        It has time to end, and to finish a save that has begun.
        """
        if not (self.may_restart and self.errors.has_error):
            return False
        self.deadline = self.deadline or time.monotonic() + _END_SECONDS
        return time.monotonic() > self.deadline

    def _is_running(self) -> bool:
        """Waits a moment; whether the process, or a worker that a killed torchrun left, runs."""
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            self.workers |= set(parent.children() if self.with_torchrun else [parent])
        try:
            self.process.wait(timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            return True
        if not any(map(is_running, self.workers)):
            return False
        time.sleep(_POLL_SECONDS)
        return True

    def _terminate(self) -> None:
        """Sends SIGTERM to every worker once, including those that torchrun starts later."""
        for worker in self.workers - self.terminated:
            self.terminated.add(worker)
            with suppress(psutil.NoSuchProcess):
                worker.terminate()

    def _kill(self) -> None:
        self.process.kill()
        for worker in self.workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()


class _ErrorFilter:
    """Forwards stderr up to and including the first line about a user's error.

    Before the ranks are connected, every rank prints that line; and torchrun adds a page about
    ranks that exited.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self.has_error = False
        self._thread: threading.Thread | None = None
        if stream is not None:
            self._thread = threading.Thread(target=self._pass_on, args=(stream,), daemon=True)
            self._thread.start()

    def _pass_on(self, stream: IO[str]) -> None:
        for line in stream:
            if not self.has_error:
                print_line(line.rstrip("\n"), sys.stderr)
                self.has_error = line.startswith(ERROR_PREFIX)

    def join(self) -> None:
        """Waits for the last line; not for a process that outlives the training."""
        if self._thread is not None:
            self._thread.join(_LAST_LINE_SECONDS)


def environment(processes: int) -> dict[str, str]:
    """Divides the cores among the processes, unless OMP_NUM_THREADS is set."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    return {"OMP_NUM_THREADS": str(threads), **RESTART_ENVIRONMENT, **os.environ}
