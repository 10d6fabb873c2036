"""What this process is doing: written by the loop, read by the watchdog's thread."""

import math
import statistics
import time
from collections import deque
from typing import Literal

from trainer.config import WatchdogConfig
from trainer.parallel.waits import Collective, Waits

Task = Literal[
    "starting",
    "reading data",
    "sampling",
    "checking answers",
    "scoring",
    "forward and backward",
    "update",
    "layer stats",
    "first evaluation",
    "evaluation",
    "continuing prompts",
    "evaluating tasks",
    "saving",
    "rolling back",
    "metrics",
]
_SLOW: tuple[Task, ...] = (
    *(
        "starting",
        "reading data",
        "sampling",
        "checking answers",
        "scoring",
        "layer stats",
        "first evaluation",
        "continuing prompts",
    ),
    *("evaluating tasks", "saving", "rolling back", "metrics"),
)
"""What takes as long as it takes, however long a step is: a file server may be away for minutes.

The first batch of an evaluation may compile, and prompts and tasks have no fixed length."""
_MEDIAN_FACTOR = 10.0
_MIN_SECONDS = 60.0
_TIMEOUT_SHARE = 0.9  # of a collective's own limit, so that the report comes before its failure
_MIN_STEPS = 3  # before their median counts; the first ones may compile
_MAX_STEPS = 101


class Heartbeat:
    """The current task of the loop, its step, and how long it may go on without progress.

    Assigning a few attributes is all that a beat costs.

    Attributes:
        step: the step in progress, from 1; 0 before the first.
    """

    def __init__(self) -> None:
        self.task: Task = "starting"
        self.step = 0
        self._beats = 0
        self._seconds: deque[float] = deque(maxlen=_MAX_STEPS)
        self._waits: Waits | None = None
        self._timeout = math.inf

    def follow(self, waits: Waits, timeout: float) -> None:
        """Takes collectives, which fail by themselves after `timeout` seconds, for progress."""
        self._waits, self._timeout = waits, timeout

    def enter(self, task: Task, step: int | None = None) -> None:
        """Reports another task, or a further part of the same one."""
        self.task = task
        self.step = self.step if step is None else step
        self._beats += 1

    def step_ended(self, seconds: float) -> None:
        """Reports the duration of a step."""
        self._seconds.append(seconds)

    def new_phase(self) -> None:
        """Forgets the duration of steps: those of the next phase may be much longer."""
        self._seconds.clear()

    @property
    def progress(self) -> tuple[int, int]:
        """A value that changes with every beat and every collective."""
        return self._beats, self._waits.calls if self._waits is not None else 0

    @property
    def collective(self) -> Collective | None:
        """The collective in which the process waits; None outside."""
        return None if self._waits is None else self._waits.current()

    @property
    def wait_limit(self) -> float:
        """Seconds after which the current collective is about to fail by itself; else infinite."""
        return _TIMEOUT_SHARE * self._timeout if self.collective is not None else math.inf

    def patience(self, config: WatchdogConfig) -> float:
        """Returns the seconds after which a lack of progress is a hang."""
        return min(self._patience(config), self.wait_limit)

    def _patience(self, config: WatchdogConfig) -> float:
        if self.task in _SLOW or len(self._seconds) < _MIN_STEPS:
            return config.slow_seconds
        if config.seconds is not None:
            return config.seconds
        return max(_MIN_SECONDS, _MEDIAN_FACTOR * statistics.median(self._seconds))


class Stopwatch:
    """How long nothing has changed, in the time that the caller itself was running.

    A process that was stopped as a whole, or a machine that slept, has not been without progress.
    """

    def __init__(self, max_gap: float) -> None:
        self._max_gap = max_gap
        self._value: object = None
        self._seconds, self._last = 0.0, time.monotonic()

    def restart(self) -> None:
        """Counts from now on."""
        self._seconds = 0.0

    def seconds(self, value: object) -> float:
        """Returns for how long `value` has been the same; to be called often."""
        now = time.monotonic()
        self._seconds += min(now - self._last, self._max_gap)
        self._last = now
        if value != self._value:
            self._value, self._seconds = value, 0.0
        return self._seconds
