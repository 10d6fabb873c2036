"""How far the running trials of a sweep are, and why one failed."""

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.activity import print_line, whole_seconds
from trainer.process.exit_codes import ERROR_PREFIX, FAILURE_PREFIX, describe_signal

PLAIN_SECONDS = 30.0
"""Between lines about the running trials where stdout is no terminal."""
_TAIL_BYTES = 1 << 16


@dataclass
class TrialProgress:
    """Steps of a running trial, from the last line of its `metrics.jsonl`."""

    number: int
    folder: Path
    steps: int
    first_step: int | None = None
    """The step at the first look; a trial that is resumed has records of an earlier call."""
    since: tuple[float, int] | None = None
    """Time and step of the first progress."""

    def describe(self) -> str:
        """Returns `trial 3: step 120/1000, loss 3.2140, 0:03:10 left`."""
        record = _last_record(self.folder / "metrics.jsonl")
        step = record.get("step", 0)
        if self.first_step is None:
            self.first_step = step
        if step == self.first_step:
            state = f"resuming after step {step}" if step else "starting"
            return f"trial {self.number}: {state}"
        now = time.monotonic()
        since, first = self.since = self.since or (now, step)
        parts = [f"trial {self.number}: step {step}/{self.steps}"]
        if isinstance(record.get("loss"), float):
            parts.append(f"loss {record['loss']:.4f}")
        if step > first:
            seconds = (now - since) / (step - first) * (self.steps - step)
            parts.append(f"{whole_seconds(seconds)} left")
        return ", ".join(parts)


def _last_record(path: Path) -> dict[str, Any]:
    """Returns the last complete line of a metrics file; empty without one."""
    try:
        with path.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            lines = file.read().split(b"\n")[:-1]
        record = json.loads(lines[-1])
    except (OSError, ValueError, IndexError):
        return {}
    return record if isinstance(record, dict) else {}


def failure_reason(returncode: int, log: Path, metric: str) -> str:
    """Returns why a trial failed: its signal, its error, or that it has no value of the metric."""
    if returncode < 0:
        return describe_signal(returncode)
    if returncode == 0:
        return f"it logged no number {metric}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith((ERROR_PREFIX, FAILURE_PREFIX))]
    last = (errors or lines or ["its log is empty"])[-1]
    return last.removeprefix(ERROR_PREFIX).removeprefix(FAILURE_PREFIX)


class SweepDisplay:
    """A live bar on a terminal, plain lines elsewhere."""

    def __init__(self, trials: int) -> None:
        console = Console(highlight=False)
        self.is_live = console.is_terminal
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console, disable=not self.is_live,
        )  # fmt: skip
        self.task = self.bar.add_task("trials", total=trials)
        self._next_line = time.monotonic() + PLAIN_SECONDS

    def line(self, text: str) -> None:
        """Prints a line, above the bar."""
        if not self.is_live:
            print_line(text)
            return
        with suppress(OSError):
            self.bar.console.print(text, markup=False, soft_wrap=True)

    def start(self) -> None:
        """Shows the bar."""
        with suppress(OSError):
            self.bar.start()

    def stop(self) -> None:
        """Stops the bar; its last state stays on the screen."""
        with suppress(OSError):
            self.bar.stop()

    def show(self, completed: int, running: Sequence[TrialProgress], best: float | None) -> None:
        """Shows the running trials: in the bar at once, in lines every half minute."""
        if self.is_live:
            parts = [trial.describe() for trial in running]
            parts += [] if best is None else [f"best {best:.4f}"]
            self.bar.update(self.task, completed=completed, description="\n".join(parts))
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PLAIN_SECONDS
            for trial in running:
                self.line(trial.describe())
