"""When a run saves a checkpoint, and when it removes old ones.

An update can ruin the weights, which shows in the losses that follow. So what is saved after it may
not replace what was saved before: no regular checkpoint is saved while steps are skipped, one is
removed after a validation loss that is not finite, and old checkpoints are removed only once a
finite loss shows that the newest one is sound.

A checkpoint is saved before an evaluation of the same step: one that fails, or is killed because it
needs more memory than training, loses no step.
"""

import math
from collections.abc import Callable

from data.storage import AnyPath
from trainer.checkpoint.run import RunCheckpoint
from trainer.config import RunConfig
from trainer.process.command_line import resume_command
from trainer.process.errors import DivergedError, SaveError
from trainer.state import TrainState
from trainer.step import StepResult

LOGGED_SECONDS = 1.0
"""A wait for the checkpoint before that is longer is logged."""


class PeriodicCheckpoints:
    """Saves every `checkpoint.every` steps, at the end and on a stop.

    All ranks call its two hooks after every step. `log` gets a line about what could not be done.
    """

    def __init__(
        self, config: RunConfig, checkpoint: RunCheckpoint, log: Callable[[str], None]
    ) -> None:
        self.config, self.checkpoint, self.log = config, checkpoint, log
        self._saved: AnyPath | None = None  # after the current step

    def before_evaluation(self, state: TrainState, result: StepResult) -> None:
        """Saves where it is due. A full disk ends only a run that would end anyway.

        Raises SaveError then.
        """
        self._report(state)
        if result.is_finite:
            self._prune()  # the step began with the weights of the newest checkpoint or later ones
        self._saved = None
        every = self.config.checkpoint.every
        ends = self._ends(state)
        if not ends and not (every > 0 and state.step % every == 0):
            return
        if state.skipping_since is not None and not ends:
            self.log(f"step {state.step}: a checkpoint is due and not saved before the next update")
            return
        self._save(state)

    def after_evaluation(self, state: TrainState, result: StepResult) -> None:
        """Judges what was saved by the validation loss; saves where the evaluation was stopped.

        Raises DivergedError where the run ends with a validation loss that is not finite.
        """
        loss = result.validation_loss
        if loss is not None and not math.isfinite(loss):
            self._remove(state, loss)
            return
        if self._ends(state) and not self.checkpoint.finish():
            self._saved = None  # begun before the evaluation in which the stop came
        if self._saved is None and state.stopping:
            self._save(state)
        self._report(state)
        if self._saved is None:
            return
        if loss is not None:
            self._prune()
        if state.skipping_since is not None:
            newest = self.checkpoint.newest_before(state.skipping_since + 1)
            self.log(f"warning: {self._saved} was saved without an update since then; {newest}")
        if state.stopping and state.step < self.config.recipe.steps:
            command = resume_command(self.config.run_dir)
            self.log(f"stopped after step {state.step}, saved {self._saved}; resume: {command}")

    def _ends(self, state: TrainState) -> bool:
        """Whether these processes train no further."""
        return state.stopping or state.step == self.config.segment.end

    def _save(self, state: TrainState) -> None:
        """Saves; beside training, unless the run ends. Raises SaveError where it ends."""
        ends, saves = self._ends(state), self.checkpoint.background
        try:
            self._saved = (self.checkpoint.save if ends else self.checkpoint.begin_save)(state)
        except SaveError as error:
            if ends:
                raise
            state.failed_saves += 1
            self.log(f"warning: {error}; training continues")
        if saves is not None and not ends and saves.waited > LOGGED_SECONDS:
            self.log(
                f"step {state.step}: waited {saves.waited:.1f} s for the checkpoint before, which "
                "was still being written; a higher checkpoint.every avoids that"
            )

    def _report(self, state: TrainState) -> None:
        """Logs what has become of saves beside training, and counts those that failed."""
        for report in self.checkpoint.reports():
            if report.problem is not None:
                state.failed_saves += 1
                self.log(f"warning: {report.problem}; training continues")
                continue
            self.log(
                f"saved {report.path}: training stopped for {report.pause:.2f} s, and it was "
                f"written within {report.seconds:.1f} s"
            )

    def _remove(self, state: TrainState, loss: float) -> None:
        """Removes the checkpoint of a step whose validation loss is not finite."""
        if self._saved is None:
            return
        problem = f"step {state.step}: the validation loss is {loss}, so its checkpoint is removed"
        if failure := self.checkpoint.remove(self._saved):
            problem += f" ({failure})"
        if self._ends(state):
            since = state.skipping_since
            first = state.step if since is None else since + 1
            raise DivergedError(f"{problem}; {self.checkpoint.newest_before(first)}")
        self.log(f"warning: {problem}; training continues")

    def _prune(self) -> None:
        if problem := self.checkpoint.prune():
            self.log(f"warning: {problem}; training continues")
