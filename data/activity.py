"""Reports that end nothing where they cannot be written, and those of work that takes long."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from io import TextIOWrapper
from typing import TextIO

REPORT_SECONDS = (3.0, 6.0, 10.0, 20.0, 40.0, 60.0)
"""When reports come after the start of the work; then after every further minute."""
_LONGEST_SECONDS = timedelta.max.total_seconds() // 2


def print_line(text: str, stream: TextIO | None = None) -> None:
    """Prints to stdout, or to `stream`, where that is possible.

    A reader or a terminal that has gone, or a log on a full disk, ends no work.
    """
    with suppress(OSError):
        print(text, file=stream, flush=True)


def prepare_streams() -> None:
    """Makes stdin, stdout and stderr safe to use with any encoding, and if closed.

    A character that stdout's encoding lacks becomes `?`; on stderr, an escape. Stdin is read as
    UTF-8; other bytes become surrogates, as in arguments. A closed stream (`>&-`) reads as empty
    and discards output; no file that is opened later gets its number.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def whole_seconds(seconds: float) -> timedelta:
    """Returns a duration to print, such as 0:01:40; at most the longest that Python can print."""
    return timedelta(seconds=round(min(seconds, _LONGEST_SECONDS)))


class Activity:
    """Logs `v4: WHAT, 12 s` on stderr while its block lasts, but nothing in the first 3 seconds.

    With a total: `v4: WHAT: 1,200 of 5,000 batches, 12 s, about 0:00:38 left`.

    Arguments:
        what: the work, as `loading the checkpoint`; may be set while the work runs.
        total: how much `advance` will count, in `unit`; 0 where that is not known.
        visible: logs nothing where False, as on all ranks but the first.
    """

    def __init__(self, what: str, total: float = 0, unit: str = "", visible: bool = True) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = 0.0
        self.before = 0.0  # of what is done, that an earlier run did
        self._start = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._report, daemon=True) if visible else None

    def __enter__(self) -> Activity:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Ends the reports, where the work ends before its block does."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()  # no line after the block

    def advance(self, amount: float = 1) -> None:
        """Counts work that is done."""
        self.done += amount

    def describe(self, spent: float) -> str:
        """Returns the line after `spent` seconds."""
        parts = [f"v4: {self.what}"]
        if self.total:
            parts[0] += f": {self.done:,.0f} of {self.total:,.0f} {self.unit}"
        parts.append(f"{spent:.0f} s")
        if self.before < self.done < self.total:
            left = whole_seconds(spent * (self.total - self.done) / (self.done - self.before))
            parts.append(f"about {left} left")
        return ", ".join(parts)

    def _report(self) -> None:
        times = list(REPORT_SECONDS)
        while not self._ended.wait(self._start + times[0] - time.monotonic()):
            print_line(self.describe(time.monotonic() - self._start), sys.stderr)
            last = times.pop(0)
            times = times or [last + REPORT_SECONDS[-1]]
