"""Chooses the next trial (optuna) and which ones stop early (wandb's Hyperband)."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from data.files import read_step_records
from launch.sweep_file import Arguments, Hyperband, Sweep
from launch.sweep_study import open_study

_ARGUMENTS, _FAILED = "arguments", "failed_in"
"""Attributes of a trial in the study: its overrides, and the call in which it failed."""


class Search:
    """The sweep's trials in the study of its folder, which several processes may share.

    Trial n depends on the seed, n, and the trials finished before it, and on nothing in memory. A
    trial that failed stays unfinished in the study, so that the next call tries it again.

    Arguments:
        call: name that all processes of one call share.
    """

    def __init__(self, sweep: Sweep, folder: Path, seed: int, call: str) -> None:
        self.sweep = sweep
        self.seed = seed
        self.call = call
        self.points = list(islice(sweep.points(), sweep.trials)) if sweep.method == "grid" else []
        self.study, self.storage = open_study(folder)

    def unfinished(self) -> list[int]:
        """Returns the trials that are running, were interrupted, or failed in an earlier call."""
        return [
            trial.number
            for trial in self._trials()
            if trial.state == TrialState.RUNNING and trial.user_attrs.get(_FAILED) != self.call
        ]

    def failed(self) -> list[int]:
        """Returns the trials that failed in this call."""
        trials = self._trials()
        return [trial.number for trial in trials if trial.user_attrs.get(_FAILED) == self.call]

    def next(self) -> int | None:
        """Starts the first waiting trial and returns its number; None once all were started."""
        for trial in self._trials():
            if trial.state == TrialState.WAITING:
                with suppress(UpdateFinishedTrialError):  # another process was faster
                    if self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                        return trial.number
        return None

    def begin(self, number: int) -> Arguments:
        """Returns the overrides of a trial that this process runs, and stores them for the others.

        Parameters are suggested now, unless an earlier start has done it.
        """
        identity = self._trials()[number]._trial_id
        arguments = self.arguments(number)
        if arguments is None:
            if self.sweep.method == "bayes":
                sampler: BaseSampler = TPESampler(seed=self.seed + number)
            else:
                sampler = RandomSampler(seed=self.seed + number)
            self.study.sampler = sampler
            trial = optuna.Trial(self.study, identity)
            flat = self.sweep.flat()
            arguments = {name: parameter.suggest(trial, name) for name, parameter in flat.items()}
        if self._trials()[number].user_attrs.get(_ARGUMENTS) != arguments:
            self.storage.set_trial_user_attr(identity, _ARGUMENTS, arguments)
        self.storage.set_trial_user_attr(identity, _FAILED, None)
        return arguments

    def arguments(self, number: int) -> Arguments | None:
        """Returns a started trial's overrides; None while another process chooses them."""
        if self.points:
            return self.points[number]
        frozen = self._trials()[number]
        if _ARGUMENTS in frozen.user_attrs:
            return dict(frozen.user_attrs[_ARGUMENTS])
        flat = self.sweep.flat()
        if frozen.params.keys() < flat.keys():
            return None
        trial = optuna.Trial(self.study, frozen._trial_id)  # of before version 0.2
        return {name: parameter.suggest(trial, name) for name, parameter in flat.items()}

    def finish(self, number: int, history: Sequence[float], state: TrialState) -> None:
        """Ends a trial as complete, pruned (stopped early) or failed; its last point counts."""
        identity = self._trials()[number]._trial_id
        if state == TrialState.FAIL:
            self.storage.set_trial_user_attr(identity, _FAILED, self.call)
            return
        if state == TrialState.PRUNED:
            trial = optuna.Trial(self.study, identity)
            for step, value in enumerate(history):
                trial.report(value, step)
        last = history[-1] if state == TrialState.COMPLETE else None
        self.study.tell(number, last, state=state)

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def values(self) -> dict[int, float]:
        """Returns the metric of every complete trial."""
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return {trial.number: trial.value for trial in complete if trial.value is not None}

    def states(self) -> dict[int, str]:
        """Returns every started trial's state: running, complete, pruned or fail."""
        return {
            trial.number: "fail" if trial.user_attrs.get(_FAILED) else trial.state.name.lower()
            for trial in self._trials()
            if trial.state != TrialState.WAITING
        }

    @property
    def is_over(self) -> bool:
        """Whether no trial is left to run in this call."""
        return len(self.states()) == self.sweep.trials and not self.unfinished()


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
