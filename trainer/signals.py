"""SIGTERM and SIGINT ask a run to stop after the current step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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
