"""The collective in which this process waits, and the seconds that it has waited in collectives.

On a CPU a collective blocks the host, whose clock measures it. On a GPU the host only queues it:
two events on the current stream measure how long the stream stands still between what was queued
before the collective and what was queued after it. Nothing waits for them.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Collective:
    """One call of a collective, the same on all `ranks` that take part in it.

    Attributes:
        name: such as `all_reduce`.
        axis: name of the grid's axis.
        number: how many with this name this process has called on the axis, this one included.
    """

    name: str
    axis: str
    ranks: tuple[int, ...]
    number: int


class _Clock(Protocol):
    def begin(self, collective: Collective, counts: bool) -> None: ...
    def end(self) -> None: ...
    def take(self) -> float: ...
    def unfinished(self) -> Collective | None: ...


class _HostClock:
    """Seconds between `begin` and `end` on the host."""

    def __init__(self) -> None:
        self._begun, self._seconds, self._counts = 0.0, 0.0, False

    def begin(self, collective: Collective, counts: bool) -> None:
        self._begun, self._counts = time.perf_counter(), counts

    def end(self) -> None:
        if self._counts:
            self._seconds += time.perf_counter() - self._begun

    def take(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def unfinished(self) -> Collective | None:
        return None  # beyond the one in which the host is


@dataclass(frozen=True)
class _Span:
    """A collective on a stream, between two events."""

    collective: Collective
    counts: bool
    begun: torch.cuda.Event
    ended: torch.cuda.Event


class _StreamClock:
    """Seconds of the current CUDA stream between `begin` and `end`, known once it has got there."""

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []
        self._spans: deque[_Span] = deque()
        self._next: tuple[Collective, bool, torch.cuda.Event] | None = None

    def begin(self, collective: Collective, counts: bool) -> None:
        self._next = collective, counts, self._record()

    def end(self) -> None:
        if self._next is not None:
            self._spans.append(_Span(*self._next, self._record()))

    def take(self) -> float:
        seconds = 0.0
        while self._spans and self._spans[0].ended.query():
            span = self._spans.popleft()
            if span.counts:
                seconds += span.begun.elapsed_time(span.ended) / 1000.0
            self._free += (span.begun, span.ended)
        return seconds

    def unfinished(self) -> Collective | None:
        for span in tuple(self._spans):
            if not span.ended.query():
                return span.collective if span.begun.query() else None
        return None

    def _record(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Waits:
    """What this process waits for, read by a watchdog's thread, and for how long it has waited.

    Attributes:
        calls: collectives and breaks in them so far: as long as it changes, the process goes on.
        is_step: whether a step is running, whose waits are counted.
    """

    def __init__(self, device: torch.device) -> None:
        self.calls = 0
        self.is_step = False
        self._current: Collective | None = None
        self._numbers: Counter[tuple[str, str]] = Counter()
        self._clock: _Clock = _StreamClock() if device.type == "cuda" else _HostClock()

    def number(self, name: str, axis: str, ranks: tuple[int, ...]) -> Collective:
        """Returns the next call of a collective, which a process may start before it waits."""
        self._numbers[name, axis] += 1
        return Collective(name, axis, ranks, self._numbers[name, axis])

    @contextmanager
    def during(self, collective: Collective) -> Iterator[None]:
        """Measures the block as a wait."""
        self._begin(collective)
        try:
            yield
        finally:
            self._end()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Measures the block as work, in the middle of a wait."""
        outer = self._current
        if outer is None:
            yield
            return
        self._end()
        try:
            yield
        finally:
            self._begin(outer)

    def current(self) -> Collective | None:
        """Returns the collective in which the host or the GPU's stream is now; None outside."""
        return self._current or self._clock.unfinished()

    def take_seconds(self) -> float:
        """Returns the seconds waited in steps since the last call; on a GPU, those known by now."""
        return self._clock.take()

    def _begin(self, collective: Collective) -> None:
        self.calls += 1
        self._current = collective
        self._clock.begin(collective, self.is_step)

    def _end(self) -> None:
        self._clock.end()
        self._current = None
        self.calls += 1
