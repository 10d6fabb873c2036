"""`v4 report` on a sweep's folder: the best setting, its margin, and the trials' curves."""

import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from data.errors import first_problem
from data.files import InsidePath, write_atomically
from trainer.metrics import Record, read_metrics
from trainer.process.errors import ReportError
from trainer.report.plots_sweep import draw_curves, draw_parallel
from trainer.report.run import page

SEED = "seed"
Setting = tuple[tuple[str, str], ...]


class TrialRecord(BaseModel):
    """The entry of a trial in `sweep.json`."""

    folder: InsidePath
    state: str
    parameters: dict[str, Any]
    value: float | None = None


class SweepRecord(BaseModel):
    """The contents of `sweep.json`."""

    metric: str
    goal: Literal["minimize", "maximize"]
    planned: int
    trials: tuple[TrialRecord, ...]


@dataclass(frozen=True)
class Trial:
    """A trial with the last value of its metric, or None."""

    folder: str
    state: str
    parameters: dict[str, Any]
    records: list[Record]
    value: float | None

    @property
    def setting(self) -> Setting:
        """All parameters but the seed, as text."""
        return tuple((k, f"{v:.4g}" if isinstance(v, float) else str(v))
                     for k, v in self.parameters.items() if k != SEED)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """The complete trials of one setting, which differ in their seed."""

    setting: Setting
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return mean(self.values)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over the seeds; None for one seed."""
        return stdev(self.values) if len(self.values) > 1 else None

    def text(self) -> str:
        """Returns the setting on one line."""
        return " ".join(f"{name}={value}" for name, value in self.setting)


def write_sweep_report(folder: Path) -> Path:
    """Writes `report.html` into a sweep's folder and returns its path.

    Raises ReportError if no trial is complete, or `sweep.json` is missing or damaged.
    """
    path = folder / "sweep.json"
    try:
        sweep = SweepRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise ReportError(f"{path}: is damaged: {first_problem(error)}") from None
    trials = [_read(folder, trial, sweep.metric) for trial in sweep.trials]
    ranking = groups(trials, sweep.goal)
    if not ranking:
        raise ReportError(f"{folder}: no trial is complete; resume the sweep")
    for sentence in sentences(ranking, sweep.goal, sweep.metric):
        print(sentence)
    target = folder / "report.html"
    write_atomically(target, render(folder.name, sweep, trials, ranking))
    return target


def _read(folder: Path, trial: TrialRecord, metric: str) -> Trial:
    path = folder / trial.folder / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() else []
    values = [record[metric] for record in records if record.get(metric) is not None]
    last = values[-1] if values else trial.value
    if not values and trial.value is not None:
        print(f"{path}: is lost or damaged; {metric} is as the sweep recorded it, without a curve")
    return Trial(trial.folder, trial.state, trial.parameters, records, last)


def groups(trials: list[Trial], goal: str) -> list[Group]:
    """Returns complete trials by setting, best mean first; settings with fewer seeds come last."""
    values: dict[Setting, list[float]] = {}
    for trial in trials:
        if trial.state == "complete" and trial.value is not None:
            values.setdefault(trial.setting, []).append(trial.value)
    by_setting = [Group(setting, tuple(group)) for setting, group in values.items()]
    sign = 1 if goal == "minimize" else -1
    seeds = max((len(group.values) for group in by_setting), default=0)
    return sorted(by_setting, key=lambda group: (len(group.values) < seeds, sign * group.mean))


def sentences(ranking: list[Group], goal: str, metric: str) -> list[str]:
    """Returns the best setting, then the values of each non-numeric parameter compared."""
    best = ranking[0]
    lines = [f"the best: {best.text()}: {metric} {amount(best)}"]
    for i, (name, _) in enumerate(best.setting):
        tuned: dict[str, Group] = {}
        for group in ranking:  # the best comes first
            tuned.setdefault(group.setting[i][1], group)
        if len(tuned) > 1 and not all(_is_number(value) for value in tuned):
            winner, *others = tuned.items()
            lines += [_comparison(name, winner, other, goal, metric) for other in others]
    return lines


def _comparison(
    name: str, winner: tuple[str, Group], other: tuple[str, Group], goal: str, metric: str
) -> str:
    """Returns `muon beats adamw by x ± y`, y the standard error of the difference of means.

    A winner that only has more seeds does not beat a setting with a better mean.
    """
    (value, group), (other_value, other_group) = winner, other
    gap = group.mean - other_group.mean
    is_worse = gap > 0 if goal == "minimize" else gap < 0
    error = standard_error(group, other_group)
    unit = " nats" if metric.endswith("loss") else ""
    wide = f" ± {error:.4f}" if error is not None else ""
    seeds = f"{len(group.values)} and {len(other_group.values)} trials"
    if len(group.values) == len(other_group.values):
        seeds = f"{len(group.values)} seed{'s' * (len(group.values) > 1)}"
    size = f"{abs(gap):.4f}{wide}{unit} of {metric}"
    result = f"{value} beats {other_value} by {size}"
    if is_worse:
        result = f"{value}, with more seeds, is worse than {other_value} by {size}"
    of_each = " and ".join(f"{amount(g)} with {g.text()}" for g in (group, other_group))
    return f"{name}: {result} ({seeds}, the best setting of each: {of_each})"


def standard_error(a: Group, b: Group) -> float | None:
    """Standard error of the difference of two means: sqrt(sd_a^2 / n_a + sd_b^2 / n_b)."""
    if a.sd is None or b.sd is None:
        return None
    return math.sqrt(a.sd**2 / len(a.values) + b.sd**2 / len(b.values))


def amount(group: Group) -> str:
    """Formats mean ± standard deviation over the seeds."""
    return f"{group.mean:.4f}" + (f" ± {group.sd:.4f}" if group.sd is not None else "")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def render(name: str, sweep: SweepRecord, trials: list[Trial], ranking: list[Group]) -> str:
    """Returns the page as HTML text."""
    metric = sweep.metric
    lines = sentences(ranking, sweep.goal, metric)
    comparison = "".join(f"<p>{escape(line)}</p>" for line in lines)
    head = [*(key for key, _ in ranking[0].setting), "seeds", metric]
    rows = [
        [*(v for _, v in group.setting), str(len(group.values)), amount(group)] for group in ranking
    ]
    each = [
        [
            t.folder,
            t.state,
            *map(str, t.parameters.values()),
            "" if t.value is None else f"{t.value:.4f}",
        ]
        for t in trials
    ]
    each_head = ["trial", "state", *trials[0].parameters, metric]
    ended = sum(trial.state != "running" for trial in trials)
    settings = [group.setting for group in ranking]
    curves = [(settings.index(t.setting), t.records) for t in trials if t.setting in settings]
    points = [(dict(group.setting), group.mean) for group in ranking]
    return page(
        name,
        f"Sweep, {ended} of {sweep.planned} trials finished",
        f"<figure>{comparison}</figure><div class=charts>"
        f"<figure class=wide><h2>{escape(metric)}, darker is better</h2>"
        f"{draw_curves(curves, metric, len(ranking))}</figure>"
        f"<figure class=wide><h2>Settings in parallel coordinates</h2>"
        f"{draw_parallel(points, metric)}</figure>"
        f"<figure class=wide><h2>Settings, best first</h2>{_table(head, rows)}</figure>"
        f"<figure class=wide><h2>Trials</h2>{_table(each_head, each)}</figure></div>",
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th align=left>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"
