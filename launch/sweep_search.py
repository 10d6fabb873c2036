"""Chooses the next trial (optuna) and which ones stop early (wandb's Hyperband)."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import optuna
from optuna.exceptions import StorageInternalError
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from data.files import read_step_records
from launch.sweep_file import Arguments, Hyperband, Sweep
from trainer.config import ConfigError


class Search:
    """The sweep's trials, stored in `study.sqlite3`, from which a killed sweep resumes.

    Trial n depends on the seed, n, and the trials finished before it, and on nothing in memory. A
    trial that failed stays unfinished in the study, so that the next call tries it again.

    Attributes:
        failed: numbers of the trials that failed since the study was opened.
    """

    def __init__(self, sweep: Sweep, folder: Path, seed: int) -> None:
        optuna.logging.set_verbosity(logging.WARNING)
        self.sweep = sweep
        self.seed = seed
        self.failed: set[int] = set()
        self.points = list(islice(sweep.points(), sweep.trials)) if sweep.method == "grid" else []
        self.study = optuna.create_study(
            storage=f"sqlite:///{folder / 'study.sqlite3'}",
            study_name="sweep",
            direction=sweep.metric.goal,
            load_if_exists=True,
        )

    def unfinished(self) -> list[int]:
        """Returns the trials that failed, or were running when the sweep was stopped."""
        return [number for number, state in self.states().items() if state == "running"]

    def next(self) -> int | None:
        """Starts one more trial and returns its number; None once all have been started."""
        started = self.study.get_trials(deepcopy=False)
        waiting = [trial for trial in started if trial.state == TrialState.WAITING]
        number = len(started) - len(waiting)
        if number >= self.sweep.trials:
            return None
        if self.points and not waiting:
            point = {name: json.dumps(value) for name, value in self.points[number].items()}
            self.study.enqueue_trial(point)
        self.study.sampler = self._sampler(number)
        trial = self.study.ask()
        for name, parameter in self.sweep.flat().items():
            parameter.suggest(trial, name)
        return trial.number

    def _sampler(self, number: int) -> BaseSampler:
        if self.sweep.method == "bayes":
            return TPESampler(seed=self.seed + number)
        return RandomSampler(seed=self.seed + number)

    def arguments(self, number: int) -> Arguments:
        """Returns a trial's overrides; parameters that a kill left undecided are suggested now."""
        if self.points:
            return self.points[number]
        self.study.sampler = self._sampler(number)
        trial = self._reopen(number)
        return {
            name: parameter.suggest(trial, name) for name, parameter in self.sweep.flat().items()
        }

    def finish(self, number: int, history: Sequence[float], state: TrialState) -> None:
        """Ends a trial as complete, pruned (stopped early) or failed; its last point counts."""
        if state == TrialState.FAIL:
            self.failed.add(number)
            return
        if state == TrialState.PRUNED:
            trial = self._reopen(number)
            for step, value in enumerate(history):
                trial.report(value, step)
        last = history[-1] if state == TrialState.COMPLETE else None
        self.study.tell(number, last, state=state)

    def _reopen(self, number: int) -> optuna.Trial:
        return optuna.Trial(self.study, self.study.get_trials(deepcopy=False)[number]._trial_id)

    def values(self) -> dict[int, float]:
        """Returns the metric of every complete trial."""
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return {trial.number: trial.value for trial in complete if trial.value is not None}

    def states(self) -> dict[int, str]:
        """Returns every started trial's state: running, complete, pruned or fail."""
        trials = self.study.get_trials(deepcopy=False)
        return {
            trial.number: "fail" if trial.number in self.failed else trial.state.name.lower()
            for trial in trials
            if trial.state != TrialState.WAITING
        }


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turns errors of the database into one sentence. Raises ConfigError."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        reason = str(getattr(cause, "orig", None) or cause)
        raise ConfigError(f"{folder / 'study.sqlite3'}: {reason}") from None


def bands(rule: Hyperband, longest: int) -> list[int]:
    """Returns iterations below `longest` at which a trial may be stopped, as wandb places them."""
    iterations = []
    if rule.max_iter is not None:
        band = float(rule.max_iter)
        for _ in range(rule.s or 0):
            band /= rule.eta
            if band >= 1:
                iterations.append(int(band))
        return sorted(band for band in iterations if band < longest)
    band = float(rule.min_iter or 1)
    while band < longest:
        iterations.append(int(band))
        band *= rule.eta
    return iterations


def should_stop(
    rule: Hyperband, goal: str, history: Sequence[float], others: Iterable[Sequence[float]]
) -> bool:
    """Whether a trial is outside the best 1/eta of all that reached its last bracket.

    `others` are the histories of all trials, including this one.
    """
    reached = bands(rule, len(history))
    if not reached:
        return False
    sign = 1.0 if goal == "minimize" else -1.0
    band = reached[-1]
    values = sorted(sign * other[band] for other in others if len(other) > band)
    return sign * history[band] > values[int(len(values) / rule.eta)]


def read_history(path: Path, name: str, every: int) -> list[float]:
    """Returns the metric's points of a `metrics.jsonl` that would be sent to wandb.

    A line is a point if its step is a multiple of `every`, was evaluated, or has layer stats. Lines
    that are no records are ignored.
    """
    points: dict[int, float] = {}
    if not path.is_file():
        return []
    for record in read_step_records(path)[0]:
        value = record.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue  # not measured in this step, not finite, or several numbers
        due = record["step"] % every == 0
        if due or "validation_loss" in record or "layers" in record:
            points[record["step"]] = value
    return [points[step] for step in sorted(points)]
