"""The progress of a run on stdout: a live line on a terminal, plain lines elsewhere."""

import math
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from data.activity import print_line, whole_seconds

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


class Progress:
    """Shows step, loss, speed and the time left.

    A log on a full disk, a reader or a terminal that has gone do not end training.
    """

    def __init__(self, steps: int, done: int, every: int) -> None:
        self.steps = steps
        self.every = every
        self._updates = 0
        self._start = time.monotonic()
        self._bar: RichProgress | None = None
        if sys.stdout.isatty():
            self._bar = _live_line()
            self._bar.start()
            self._task = self._bar.add_task("", total=steps, completed=done)

    def update(self, record: dict[str, Any]) -> None:
        """Shows a step's record."""
        step = record["step"]
        self._updates += 1
        text = describe(record, self._time_left(step))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif step % self.every == 0 or step == self.steps:
            print_line(f"step {step}/{self.steps}  {text}")

    def log(self, message: str) -> None:
        """Prints a line, above the live one."""
        if self._bar is None:
            print_line(message)
            return
        with suppress(OSError):
            self._bar.console.print(message, highlight=False)

    def close(self) -> None:
        """Stops the live line; its last state stays on the screen."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()

    def _time_left(self, step: int) -> timedelta:
        """At the pace so far; steps that were trained again count again."""
        spent = time.monotonic() - self._start
        return whole_seconds(spent / self._updates * (self.steps - step))


def _live_line() -> "RichProgress":
    from rich.console import Console  # a quarter of a second to import
    from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.description}"),
    )
    return RichProgress(*columns, console=Console())


def describe(record: dict[str, Any], left: timedelta) -> str:
    """Formats a record: `loss 3.2140  validation 3.4010  12 345 tokens/s  ETA 0:01:40`.

    Both losses are those of the language model (`lm_loss`), without MTP and balance.
    """
    validation = ""
    if "validation_loss" in record:
        validation = f"  validation {_number(record['validation_loss'])}"
    speed = f"{record['tokens_per_second']:,.0f}".replace(",", " ")
    loss = f"loss {_number(record['lm_loss'])}"
    if not record["tokens_per_second"]:
        loss = "batch skipped"
    return f"{loss}{validation}  {speed} tokens/s  ETA {left}"


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not finite"
