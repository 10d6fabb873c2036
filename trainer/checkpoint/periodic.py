"""When a run saves a checkpoint, and when it removes old ones.

An update can ruin the weights, which shows in the losses that follow. So what is saved after it may
not replace what was saved before: no regular checkpoint is saved while steps are skipped or after a
validation loss that is not finite, and old checkpoints are removed only once a finite loss shows
that the newest one is sound.
"""

import math
from collections.abc import Callable

from trainer.checkpoint.run import RunCheckpoint
from trainer.config import RunConfig
from trainer.process.command_line import resume_command
from trainer.process.errors import DivergedError, SaveError
from trainer.state import TrainState
from trainer.step import StepResult


class PeriodicCheckpoints:
    """Saves every `checkpoint.every` steps, at the end and on a stop; a hook after every step.

    All ranks call it. `log` gets a line about what could not be done.
    """

    def __init__(
        self, config: RunConfig, checkpoint: RunCheckpoint, log: Callable[[str], None]
    ) -> None:
        self.config, self.checkpoint, self.log = config, checkpoint, log

    def __call__(self, state: TrainState, result: StepResult) -> None:
        """Saves where it is due. A full disk ends only a run that would end anyway.

        Raises SaveError then, and DivergedError where the run ends with ruined weights.
        """
        if result.is_finite:
            self._prune()  # the step began with the weights of the newest checkpoint or later ones
        every = self.config.checkpoint.every
        ends = state.stopping or state.step == self.config.recipe.steps
        is_due = ends or (every > 0 and state.step % every == 0)
        if not is_due or not self._is_sound(state, result, ends):
            return
        try:
            path = self.checkpoint.save(state)
        except SaveError as error:
            if ends:
                raise
            self.log(f"warning: {error}; training continues")
            return
        if result.validation_loss is not None:
            self._prune()
        if state.skipping_since is not None:
            newest = self.checkpoint.newest_before(state.skipping_since + 1)
            self.log(f"warning: {path} was saved without an update since then; {newest}")
        if state.stopping and state.step < self.config.recipe.steps:
            command = resume_command(self.config.run_dir)
            self.log(f"stopped after step {state.step}, saved {path}; resume: {command}")

    def _is_sound(self, state: TrainState, result: StepResult, ends: bool) -> bool:
        """Whether the weights may be saved; while steps are skipped, only at the end.

        Raises DivergedError where the run ends with a validation loss that is not finite.
        """
        loss, since = result.validation_loss, state.skipping_since
        if loss is not None and not math.isfinite(loss):
            problem = f"step {state.step}: the validation loss is {loss}, so nothing is saved"
            if ends:
                first = state.step if since is None else since + 1
                raise DivergedError(f"{problem}; {self.checkpoint.newest_before(first)}")
            self.log(f"warning: {problem}; training continues")
            return False
        if since is not None and not ends:
            self.log(f"step {state.step}: a checkpoint is due and not saved before the next update")
            return False
        return True

    def _prune(self) -> None:
        if problem := self.checkpoint.prune():
            self.log(f"warning: {problem}; training continues")
