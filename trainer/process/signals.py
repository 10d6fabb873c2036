"""Signals: SIGTERM, SIGINT and SIGHUP ask a run to stop after a step, SIGUSR1 for a profile of
the next ones; Ctrl-C ends a command.

Imports little, so that the handlers are there before what takes long to import.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from data.activity import print_line
from trainer.process.exit_codes import INTERRUPTED, INTERRUPTED_LINE, exit_code_of

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PROFILE_SIGNAL = signal.SIGUSR1
_GRACE_SECONDS = 10.0  # for ranks that are all there, and can end together


class StopRequest:
    """Whether this process was asked to stop; the engine reduces it over ranks every step."""

    def __init__(self) -> None:
        self.requested = False

    def request(self, signum: int = 0, frame: FrameType | None = None) -> None:
        """Requests a stop; a signal handler.

        Another call changes nothing: torchrun and a terminal may both deliver the same signal.
        """
        self.requested = True


class ProfileRequest:
    """Whether this process was asked for a profile; see trainer/profiling.py."""

    def __init__(self) -> None:
        self.requested = False

    def request(self, signum: int = 0, frame: FrameType | None = None) -> None:
        """Requests a profile; a signal handler."""
        self.requested = True


@contextmanager
def profile_on_signal() -> Iterator[ProfileRequest]:
    """Yields a ProfileRequest that SIGUSR1 sets; restores the old handler afterwards."""
    request = ProfileRequest()
    old = signal.signal(PROFILE_SIGNAL, request.request)
    try:
        yield request
    finally:
        signal.signal(PROFILE_SIGNAL, old)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Yields a StopRequest that signals set; restores the old handlers afterwards.

    torchrun sends its ranks the signal that it got itself, SIGHUP where its terminal is closed. It
    stays ignored where nohup has it ignored.
    """
    request = StopRequest()
    is_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    old = {
        number: signal.signal(number, request.request)
        for number in STOP_SIGNALS
        if not (is_nohup and number == signal.SIGHUP)
    }
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def end_on_signals(stop: StopRequest, what: str) -> Iterator[None]:
    """Ends the process some seconds after a signal in a block that may wait for other processes.

    They may never come, and the wait is inside a library, where Python runs no handler: the system
    wakes a thread. The exit code is 128 + n after signal n, so that torchrun ends the other ranks;
    an earlier request counts as SIGTERM.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    is_over = threading.Event()

    def watch() -> None:
        number: int = signal.SIGTERM
        while not stop.requested:
            received = os.read(reader, 1)
            if not received:
                return  # closed
            number = received[0]
            if number in STOP_SIGNALS:
                break
        if not is_over.wait(_GRACE_SECONDS):
            print_line(f"stopped while {what}; nothing was begun")
            os._exit(exit_code_of(-number))

    thread = threading.Thread(target=watch, daemon=True)
    old = signal.set_wakeup_fd(writer)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        signal.set_wakeup_fd(old)
        os.close(writer)
        thread.join()
        os.close(reader)


def raise_on_interrupt() -> None:
    """Makes SIGINT raise KeyboardInterrupt, but end the process inside an import.

    Libraries do not expect an exception there: torch turns it into others, or loses it. The
    launcher blocks the signal while it starts a process, where Python has no handler yet.
    """
    signal.signal(signal.SIGINT, _on_interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _on_interrupt(signum: int, frame: FrameType | None) -> None:
    caller = frame
    while caller is not None:
        if caller.f_code.co_filename.startswith("<frozen importlib"):
            print_line(INTERRUPTED_LINE, sys.stderr)
            os._exit(INTERRUPTED)
        caller = caller.f_back
    raise KeyboardInterrupt
