"""Which rank is slow: how long each works in a step, waits for the others not included.

A rank is compared with the median of the other ranks of its pipeline stage, which do the same work;
a stage of one rank with those of all.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

WINDOW_STEPS = 20  # over which a slow rank is reported
SLOW_EXCESS = 0.1
REPEAT_STEPS = 1000  # until the same rank is reported again


@dataclass(frozen=True)
class SlowestRank:
    """The rank that works longest beyond the others; `excess` 0.31 is 31% longer."""

    rank: int
    host: str
    seconds: float
    excess: float


class RankTimes:
    """Averages the work of every rank over steps, and logs a rank that is slow.

    Arguments:
        hosts: of every rank.
        stages: number of pipeline stages, each of consecutive ranks.
    """

    def __init__(self, hosts: Sequence[str], stages: int, log: Callable[[str], None]) -> None:
        self.hosts, self.log = hosts, log
        size = len(hosts) // stages
        self._stage_size = size if size > 1 else len(hosts)
        self._window: list[Sequence[float]] = []
        self._steps: list[Sequence[float]] = []
        self._last_report: tuple[int, int] | None = None  # rank and step

    def add(self, step: int, seconds: Sequence[float]) -> None:
        """Adds the work of all ranks in a step; nothing where a step has none."""
        if len(self.hosts) < 2 or not any(seconds):
            return
        self._steps.append(seconds)
        self._window.append(seconds)
        if len(self._window) == WINDOW_STEPS:
            self._report(step, self.slowest(_means(self._window)))
            self._window = []

    def take(self) -> dict[str, Any]:
        """Returns the means over the steps since the last call, as a record of metrics has them."""
        if not self._steps:
            return {}
        means = _means(self._steps)
        self._steps = []
        slowest = self.slowest(means)
        return {
            "work_seconds": [round(seconds, 6) for seconds in means],
            "slowest": {"rank": slowest.rank, "host": slowest.host, "excess": slowest.excess},
        }

    def slowest(self, seconds: Sequence[float]) -> SlowestRank:
        """Returns the slowest rank, by the work of all of them."""
        excesses = []
        for rank, own in enumerate(seconds):
            first = rank // self._stage_size * self._stage_size
            stage = seconds[first : first + self._stage_size]
            others = [*stage[: rank - first], *stage[rank - first + 1 :]]
            excesses.append(own / max(statistics.median(others), 1e-9) - 1.0)
        rank = max(range(len(seconds)), key=excesses.__getitem__)
        return SlowestRank(rank, self.hosts[rank], seconds[rank], excesses[rank])

    def _report(self, step: int, slowest: SlowestRank) -> None:
        last = self._last_report
        is_repeated = last is not None and last[0] == slowest.rank
        if slowest.excess < SLOW_EXCESS or (
            is_repeated and last is not None and step < last[1] + REPEAT_STEPS
        ):
            return
        self._last_report = slowest.rank, step
        self.log(
            f"step {step}: rank {slowest.rank} on {slowest.host} is slow: in the last "
            f"{WINDOW_STEPS} steps it worked {slowest.seconds:.3f} s per step, "
            f"{slowest.excess:.0%} longer than the median of the ranks with the same work, which "
            "wait for it"
        )


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]
