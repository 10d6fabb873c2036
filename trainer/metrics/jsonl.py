"""`metrics.jsonl`: one JSON object for every step of a run."""

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.activity import print_line
from data.files import read_step_records, write_atomically

Record = dict[str, Any]
Event = dict[str, Any]
"""A rollback: `spike_step`, `reason`, `restored_step` (None where there was nothing to restore),
`rollbacks`, `skipped_batch` (None for none), `anticipation_end` (its last step; None where there is
none or it lasts to the end of the run), `stop_reason` (None unless the run ends); see
stability/rollback.py. Steps are counted from 1 here, from 0 in TrainState."""

_OLD_KEYS = {
    "heldout_loss": "validation_loss",
    "heldout_by_source": "validation_by_source",
    "stage": "phase",
    "anticipates": "anticipatory_routing",
}
_OLD_LAYER_KEYS = {
    "experts_dead": "dead_expert_share",
    "comb_departure": "comb_sum_error",
    "clamped": "swiglu_clamped_share",
}
_OLD_EVENT_KEYS = {
    "seen_at": "spike_step",
    "what": "reason",
    "back_to": "restored_step",
    "left_out": "skipped_batch",
    "anticipation_until": "anticipation_end",
    "stopped": "stop_reason",
}
"""Keys that older runs wrote, and what they are called now."""

_MAPPINGS = (
    *("epochs", "validation_by_source", "validation_bits_per_byte_by_source", "layers", "groups"),
    *("slowest", "samples", "tasks", "post"),
)
_EVENT_STEPS = ("restored_step", "skipped_batch", "anticipation_end")


class MetricsFile:
    """Appends to `metrics.jsonl`, also after a resume.

    A rollback has a line of its own, `{"step": ..., "event": {...}}`; the steps that are trained
    again follow it, and of two lines for one step the later counts. A number that is not finite is
    null, since JSON has none. A full disk does not end training: lines wait in memory until they
    can be written.
    """

    def __init__(self, path: Path, last_step: int, log: Callable[[str], None] = print_line) -> None:
        """Opens for appending; lines of steps after `last_step` are dropped.

        `log` gets a line where the file cannot be written, where it can again, and where it has
        lines that are no records: they are dropped, and the file as it was is kept in
        `metrics.jsonl.damaged`.

        Raises DataError, and leaves an earlier file as it is, where the disk is full.
        """
        self.path, self.log = path, log
        records: list[Record] = []
        if path.exists():
            self._keep_damaged()
            records = read_metrics(path, last_step)
            for step, event in read_events(path, last_step):
                place = sum(record["step"] <= step for record in records)
                records.insert(place, {"step": step, "event": event})
        self._pending: list[bytes] = []
        self._is_failing = False
        content = b"".join(_line(record) for record in records)
        write_atomically(path, content)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run
        self._complete_bytes = len(content)
        self._last_bytes = 0  # of the line that was written last

    def _keep_damaged(self) -> None:
        records, others = read_step_records(self.path)
        others += sum(_with_new_keys(record) is None for record in records)
        if others:
            copy = self.path.with_name(f"{self.path.name}.damaged")
            write_atomically(copy, self.path.read_bytes())
            self.log(
                f"warning: {others} lines of {self.path} are no records and are dropped; the file "
                f"as it was is {copy}"
            )

    def write(self, record: Record, replaces_last: bool = False) -> None:
        """Appends one object, or writes it in place of the last one."""
        if replaces_last:
            self._remove_last()
        self._pending.append(_line(record))
        problem = self._flush()
        if problem and not self._is_failing:
            self.log(f"warning: {self.path} cannot be written: {problem}; its lines wait in memory")
        elif self._is_failing and not problem:
            self.log(f"{self.path} can be written again, and is complete")
        self._is_failing = problem is not None

    def _remove_last(self) -> None:
        """Removes the last line; a disk that fails keeps it, and the later line counts."""
        if self._pending:
            self._pending.pop()
            return
        with suppress(OSError):
            self._file.truncate(self._complete_bytes - self._last_bytes)
            self._complete_bytes -= self._last_bytes
            self._last_bytes = 0

    def _flush(self) -> str | None:
        """Writes the pending lines; returns the reason where that is not possible now."""
        data = b"".join(self._pending)
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:]) or 0
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._complete_bytes)  # no half line: the rest follows later
                self._file.seek(self._complete_bytes)
            return _reason(error)
        self._complete_bytes += len(data)
        self._last_bytes = len(self._pending[-1]) if self._pending else self._last_bytes
        self._pending.clear()
        return None

    def close(self) -> None:
        """Makes everything durable, or logs what is lost."""
        problem = self._flush()
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            problem = problem or _reason(error)
        if problem:
            lines = f"the last {len(self._pending)} lines" if self._pending else "the last lines"
            self.log(f"warning: {self.path} lacks {lines}, which cannot be written: {problem}")


def _line(record: Record) -> bytes:
    """Returns a line of the file; null stands for a number that is not finite."""
    return (json.dumps(finite(record), allow_nan=False) + "\n").encode()


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def finite(value: Any) -> Any:
    """Returns a JSON value with None, JSON's null, for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def read_metrics(path: Path, last_step: int | None = None) -> list[Record]:
    """Returns the objects of a metrics file up to `last_step`, one per step, in order.

    Lines that are no records are skipped. Keys of older runs are renamed.
    """
    lines = _lines(path, last_step)
    records = {record["step"]: record for record in lines if "event" not in record}
    return [records[step] for step in sorted(records)]


def read_events(path: Path, last_step: int | None = None) -> list[tuple[int, Event]]:
    """Returns the rollbacks, each with the step that was restored, in the order of the file."""
    lines = _lines(path, last_step)
    return [(record["step"], record["event"]) for record in lines if "event" in record]


def _lines(path: Path, last_step: int | None) -> list[Record]:
    """Returns the records of a file up to `last_step`."""
    records, _ = read_step_records(path)
    return [
        renamed
        for record in records
        if (last_step is None or record["step"] <= last_step)
        and (renamed := _with_new_keys(record)) is not None
    ]


def _with_new_keys(record: Record) -> Record | None:
    """Returns a record, if of an older run with the keys that are written now.

    None for a damaged one, with values of other types than are written.
    """
    renamed = {_OLD_KEYS.get(key, key): value for key, value in record.items()}
    for key, old_keys in (("layers", _OLD_LAYER_KEYS), ("event", _OLD_EVENT_KEYS)):
        if key in renamed:
            if not isinstance(renamed[key], dict):
                return None
            renamed[key] = {old_keys.get(name, name): x for name, x in renamed[key].items()}
    is_sound = _is_event(renamed["event"]) if "event" in renamed else _is_step(renamed)
    return renamed if is_sound else None


def _is_step(record: Record) -> bool:
    inner: dict[str, Any] = {
        "layers": list,
        "groups": dict,
        "slowest": float | int | str,
        "samples": str,
    }
    for key, value in record.items():
        if key == "work_seconds":
            if not isinstance(value, list) or not all(isinstance(x, float | int) for x in value):
                return False
            continue
        if key in _MAPPINGS:
            if not isinstance(value, dict):
                return False
            values = value.values()
            if not all(isinstance(x, inner.get(key, float | int | None)) for x in values):
                return False
        elif not isinstance(value, float | int | None):
            return False
    return True


def _is_event(event: Record) -> bool:
    if not isinstance(event.get("spike_step"), int) or not isinstance(event.get("reason"), str):
        return False
    ending = event.get("stop_reason", 0)
    if not isinstance(ending, str | None):
        return False
    steps = [event.get(key, "") for key in _EVENT_STEPS]
    is_restored = ending is not None or steps[0] is not None
    return is_restored and all(isinstance(step, int | None) for step in steps)
