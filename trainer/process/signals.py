"""Signals: SIGTERM and SIGINT ask a run to stop after the current step; Ctrl-C ends a command.

Imports little, so that the handlers are there before what takes long to import.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from data.activity import print_line
from trainer.process.exit_codes import INTERRUPTED, INTERRUPTED_LINE


class StopRequest:
    """Whether this process was asked to stop; the engine reduces it over ranks every step."""

    def __init__(self) -> None:
        self.requested = False

    def request(self, signum: int = 0, frame: FrameType | None = None) -> None:
        """Requests a stop; a signal handler.

        Another call changes nothing: torchrun and a terminal may both deliver the same signal.
        """
        self.requested = True


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Yields a StopRequest that SIGTERM and SIGINT set; restores the old handlers afterwards."""
    request = StopRequest()
    old = {
        number: signal.signal(number, request.request) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


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
