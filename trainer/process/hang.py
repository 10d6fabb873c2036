"""The report on a run that makes no progress: which ranks wait in which collective for whom."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from trainer.formatting import rank_list, where
from trainer.parallel.waits import Collective

_SHOWN = 3  # causes, and collectives that wait for them


@dataclass(frozen=True)
class RankReport:
    """What one rank does.

    Attributes:
        task, step: as of its heartbeat.
        seconds: for how long it has made no progress.
        patience: for how long it may.
        collective: the one in which it waits; None outside.
        place: file, line and function of ours that its main thread runs.
    """

    rank: int
    host: str
    pid: int
    task: str
    step: int
    seconds: float
    patience: float
    collective: Collective | None = None
    place: str = ""

    def to_json(self) -> str:
        """Returns a form that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> RankReport:
        """Reads a report of another rank."""
        values = json.loads(text)
        if (collective := values["collective"]) is not None:
            ranks = tuple(collective["ranks"])
            values["collective"] = Collective(**collective | {"ranks": ranks})
        return cls(**values)

    @property
    def during(self) -> str:
        """Where in the run the rank is, as in `step 12, forward and backward`."""
        return f"step {self.step}, {self.task}" if self.step else self.task


def describe_hang(
    reports: Mapping[int, RankReport], silent: Mapping[int, RankReport | None]
) -> str:
    """Returns clauses about which ranks wait where and for whom.

    Arguments:
        reports: by rank, of those that answered.
        silent: of those that did not, the last sign of life, if there was any.
    """
    waiting: dict[Collective, list[int]] = {}
    for rank, report in sorted(reports.items()):
        if report.collective is not None:
            waiting.setdefault(report.collective, []).append(rank)
    missing = {
        collective: [rank for rank in collective.ranks if rank not in present]
        for collective, present in waiting.items()
    }
    causes = [rank for rank in reports if reports[rank].collective is None]
    clauses = _of_waiting(waiting, missing, reports, {*causes, *silent})
    clauses += [_of_cause(reports[rank]) for rank in sorted(causes)[:_SHOWN]]
    clauses += [_of_silent(rank, silent[rank]) for rank in sorted(silent)[:_SHOWN]]
    if more := max(len(causes) - _SHOWN, 0) + max(len(silent) - _SHOWN, 0):
        clauses.append(f"{more} more ranks are in no collective or do not answer")
    if not causes and not silent:
        clauses.append("these ranks call different collectives, of which one was left out or added")
    return "; ".join(clauses)


def _of_waiting(
    waiting: Mapping[Collective, Sequence[int]],
    missing: Mapping[Collective, Sequence[int]],
    reports: Mapping[int, RankReport],
    causes: set[int],
) -> list[str]:
    """Returns a clause for each collective, those that wait for a cause first."""
    order = sorted(waiting, key=lambda c: (not causes & set(missing[c]), -len(waiting[c])))
    clauses = []
    for collective in order[:_SHOWN]:
        absent = missing[collective]
        text = _of_wait(collective, [reports[rank] for rank in waiting[collective]])
        clauses.append(text + (f" for {rank_list(absent)}" if absent else " together"))
    if more := sum(len(waiting[collective]) for collective in order[_SHOWN:]):
        clauses.append(f"{more} more ranks wait in {len(order) - _SHOWN} other collectives")
    return clauses


def _of_wait(collective: Collective, reports: Sequence[RankReport]) -> str:
    text = (
        f"{where(reports)} wait{'' if len(reports) > 1 else 's'} in {collective.name} number "
        f"{collective.number} over the axis {collective.axis} ({reports[0].during}"
    )
    return text + (f", {reports[0].place})" if reports[0].place else ")")


def describe_rank(report: RankReport) -> str:
    """Returns a clause about where one rank is."""
    if report.collective is None:
        return _of_cause(report)
    return _of_wait(report.collective, [report])


def _of_cause(report: RankReport) -> str:
    place = f": {report.place}" if report.place else ""
    return f"{where([report])} is in no collective but in {report.during}{place}"


def _of_silent(rank: int, last: RankReport | None) -> str:
    if last is None:
        return f"rank {rank} has given no sign of life"
    where_last = f"; its last sign was in {last.during}"
    return (
        f"{where([last])} (pid {last.pid}) does not answer, as a process that is stopped, or one "
        f"in which foreign code holds Python's interpreter{where_last}"
    )
