"""Which trial comes next, and which one stops early: optuna, and wandb's Hyperband."""

import json
import logging
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from launch.sweep_file import Arguments, Hyperband, Sweep


class Search:
    """The sweep's trials, durable in `study.sqlite3`; a killed sweep goes on where it was.

    Trial n depends on the seed, n, and the trials told before it, and on nothing in memory.
    """

    def __init__(self, sweep: Sweep, folder: Path, seed: int) -> None:
        optuna.logging.set_verbosity(logging.WARNING)
        self.sweep = sweep
        self.seed = seed
        self.points = list(islice(sweep.points(), sweep.trials)) if sweep.method == "grid" else []
        self.study = optuna.create_study(
            storage=f"sqlite:///{folder / 'study.sqlite3'}",
            study_name="sweep",
            direction=sweep.metric.goal,
            load_if_exists=True,
        )

    def interrupted(self) -> list[int]:
        """Trials that were running when the sweep ended."""
        return [number for number, state in self.states().items() if state == "running"]

    def next(self) -> int | None:
        """Start one more trial; None where all have been started."""
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
        """Overrides of a trial; what a kill left open of a running one is decided now."""
        if self.points:
            return self.points[number]
        self.study.sampler = self._sampler(number)
        trial = self._reopen(number)
        return {
            name: parameter.suggest(trial, name) for name, parameter in self.sweep.flat().items()
        }

    def tell(self, number: int, history: Sequence[float], state: TrialState) -> None:
        """End a trial as complete, pruned (stopped early) or failed; its value is the last one."""
        if state == TrialState.PRUNED:
            trial = self._reopen(number)
            for step, value in enumerate(history):
                trial.report(value, step)
        last = history[-1] if state == TrialState.COMPLETE else None
        self.study.tell(number, last, state=state)

    def _reopen(self, number: int) -> optuna.Trial:
        return optuna.Trial(self.study, self.study.get_trials(deepcopy=False)[number]._trial_id)

    def states(self) -> dict[int, str]:
        """Every started trial's state: running, complete, pruned or fail."""
        trials = self.study.get_trials(deepcopy=False)
        return {
            trial.number: trial.state.name.lower()
            for trial in trials
            if trial.state != TrialState.WAITING
        }


def bands(rule: Hyperband, longest: int) -> list[int]:
    """Iterations below `longest` at which a trial may be stopped, as wandb places them."""
    found = []
    if rule.max_iter is not None:
        band = float(rule.max_iter)
        for _ in range(rule.s or 0):
            band /= rule.eta
            if band >= 1:
                found.append(int(band))
        return sorted(band for band in found if band < longest)
    band = float(rule.min_iter or 1)
    while band < longest:
        found.append(int(band))
        band *= rule.eta
    return found


def should_stop(
    rule: Hyperband, goal: str, history: Sequence[float], others: Iterable[Sequence[float]]
) -> bool:
    """Whether a trial is outside the best 1/eta of all that reached its last bracket.

    `others` holds the histories of all trials, this one's among them.
    """
    reached = bands(rule, len(history))
    if not reached:
        return False
    sign = 1.0 if goal == "minimize" else -1.0
    band = reached[-1]
    values = sorted(sign * other[band] for other in others if len(other) > band)
    return sign * history[band] > values[int(len(values) / rule.eta)]


def read_history(path: Path, name: str, every: int) -> list[float]:
    """The metric's points of a `metrics.jsonl` that wandb would be sent, as far as they are whole.

    A line is a point where its step is a multiple of `every` or was evaluated.
    """
    points: dict[int, Any] = {}
    if not path.is_file():
        return []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the line that is being written
        if name in record and (record["step"] % every == 0 or "validation_loss" in record):
            points[record["step"]] = record[name]
    return [points[step] for step in sorted(points)]
