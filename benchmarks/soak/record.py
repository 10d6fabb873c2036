"""What a soak leaves in its folder: events and samples, appended, and what follows from them."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.soak.training import MetricsReader, Training
from trainer.metrics import Record

Line = dict[str, Any]
COMPARED = ("loss", "lm_loss", "mtp_loss", "balance_loss", "grad_norm", "tokens", "learning_rate")
SAMPLE_SECONDS = 1.0
WARM_STEPS = 10
"""Steps of its ranks after which a process's memory counts for a line: the first ones compile, and
the first save is over."""


class Lines:
    """A file of JSON lines that grows over all pieces of a soak."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def add(self, **fields: Any) -> None:
        """Appends an object with the time."""
        with self._lock, self.path.open("a") as stream:
            stream.write(json.dumps({"time": time.time(), **fields}) + "\n")

    def read(self) -> list[Line]:
        """Returns all objects."""
        if not self.path.is_file():
            return []
        lines = []
        for line in self.path.read_text().splitlines():
            with suppress(ValueError):  # of a soak that was killed
                lines.append(json.loads(line))
        return lines


class Sampler:
    """Writes memory and open files of a training's processes every second, in a thread.

    Attributes:
        steps: that the ranks have taken since they started.
    """

    def __init__(self, samples: Lines) -> None:
        self.samples = samples
        self.training: Training | None = None
        self.steps = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            training = self.training
            for member in training.members() if training is not None else []:
                with suppress(psutil.Error, OSError):
                    self.samples.add(
                        role=member.role,
                        rank=member.rank,
                        pid=member.process.pid,
                        steps=self.steps,
                        rss=member.process.memory_info().rss,
                        files=member.process.num_fds(),
                    )

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        self._thread.join()


class Comparison:
    """Compares every record that a run writes with those of the undisturbed run."""

    def __init__(self, reference: dict[int, Record], path: Path) -> None:
        self.reference, self._reader = reference, MetricsReader(path)
        self.compared = 0
        self.differences: list[str] = []
        self.last = self.highest = 0
        """Step of the record that was read last, and the highest one."""
        self._times: dict[int, float] = {}

    def new_steps(self) -> list[int]:
        """Reads on; returns the steps of records that are new, and were not only read again."""
        steps = []
        for record in self._reader.new_records():
            step = record["step"]
            if self._times.get(step) == record["time"]:
                continue
            self._times[step] = record["time"]
            theirs = self.reference[step]
            self.compared += 1
            self.differences += [
                f"{name} of step {step}: {record.get(name)!r} and {theirs.get(name)!r}"
                for name in COMPARED
                if record.get(name) != theirs.get(name)
            ]
            if step != self.last or "validation_loss" not in record:  # else written once more
                steps.append(step)
            self.last, self.highest = step, max(self.highest, step)
        return steps


@dataclass(frozen=True)
class FittedLine:
    """A line fitted to samples of several processes, with a constant for each.

    Attributes:
        median: of all samples.
        slope: per hour.
        error: standard error of the slope.
        processes, samples: how many there were.
    """

    median: float
    slope: float
    error: float
    processes: int
    samples: int


def fit(samples: Iterable[Line], role: str, key: str) -> FittedLine | None:
    """Fits a line to a quantity of the processes of a role within their lives."""
    series: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for sample in samples:
        if sample["role"] == role and sample.get("steps", 0) >= WARM_STEPS:
            series[sample["pid"]].append((sample["time"] / 3600, sample[key]))
    long = [np.array(points) for points in series.values() if len(points) >= 3]
    if not long:
        return None
    centred = np.concatenate([points - points.mean(axis=0) for points in long])
    times, values = centred[:, 0], centred[:, 1]
    spread = float(times @ times)
    slope = float(times @ values) / spread
    freedom = max(len(values) - len(long) - 1, 1)
    error = float(np.sqrt(((values - slope * times) ** 2).sum() / freedom / spread))
    median = statistics.median(value for points in long for value in points[:, 1])
    return FittedLine(median, slope, error, len(long), len(values))
