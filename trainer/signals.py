"""SIGTERM and SIGINT ask for an end after the current step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether this process was asked to stop; the engine agrees on it with the other ranks."""

    def __init__(self) -> None:
        self.made = False

    def make(self, signum: int = 0, frame: FrameType | None = None) -> None:
        """Ask for the end; a signal handler. Repeats change nothing: torchrun and a terminal may
        both deliver the same signal."""
        self.made = True


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """A StopRequest that SIGTERM and SIGINT make; the old handlers come back afterwards."""
    request = StopRequest()
    old = {
        number: signal.signal(number, request.make) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
