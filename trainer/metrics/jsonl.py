"""`metrics.jsonl`: one JSON object for every step of a run."""

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Event = dict[str, Any]
"""How a run turned back: `seen_at` (the step), `what`, `back_to`, `rollbacks`, `left_out`,
`anticipation_until`, `stopped`; see stability.py."""


class MetricsFile:
    """`metrics.jsonl`: one object for every step, also after a resume.

    A run that turns back says so in a line of its own, `{"step": ..., "event": {...}}`, and writes
    the steps that come again a second time: the later line counts.
    A full disk does not end training: lines wait in memory until they can be written.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        """Open for appending; lines of steps after `first_step` are dropped."""
        self.path = path
        kept = []
        if path.exists():
            kept = read_metrics(path, first_step)
            for step, event in read_events(path, first_step):
                place = sum(record["step"] <= step for record in kept)
                kept.insert(place, {"step": step, "event": event})
        self._waiting = "".join(json.dumps(record) + "\n" for record in kept)
        aside = path.with_name(f".{path.name}.tmp")
        self._file = open(aside, "wb", buffering=0)  # noqa: SIM115 - open as long as the run
        self._whole = 0
        self.flush()
        os.fsync(self._file.fileno())
        os.replace(aside, path)

    def write(self, record: Record) -> None:
        """Append one step's object."""
        self._waiting += json.dumps(record) + "\n"
        self.flush()

    def flush(self) -> str | None:
        """Write what waits; returns the reason where that is not possible now."""
        data = self._waiting.encode()
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:]) or 0
        except OSError as error:
            self._file.truncate(self._whole)  # no half line: the rest comes again later
            self._file.seek(self._whole)
            return error.strerror or type(error).__name__
        self._whole += len(data)
        self._waiting = ""
        return None

    def close(self) -> None:
        """Make everything durable."""
        self.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(path: Path, last_step: int | None = None) -> list[Record]:
    """The objects of a metrics file up to `last_step`, one a step, in order.

    A torn last line, as a crash may leave it, is skipped.
    """
    lines = _lines(path, last_step)
    records = {record["step"]: record for record in lines if "event" not in record}
    return [records[step] for step in sorted(records)]


def read_events(path: Path, last_step: int | None = None) -> list[tuple[int, Event]]:
    """When a run turned back: to which step, and what happened, in the order of the file."""
    lines = _lines(path, last_step)
    return [(record["step"], record["event"]) for record in lines if "event" in record]


def _lines(path: Path, last_step: int | None) -> list[Record]:
    """The objects of a file up to `last_step`, without a torn line."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if last_step is None or record["step"] <= last_step:
            found.append(record)
    return found
