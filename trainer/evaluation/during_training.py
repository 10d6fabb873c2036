"""What a run measures between its steps: validation loss, continued prompts, tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from data import Tokenizer
from trainer.config import Phase, RunConfig
from trainer.engine import Engine
from trainer.evaluation.scoring import RowSizes
from trainer.evaluation.shared_model import SharedModel
from trainer.evaluation.tasks import Tasks
from trainer.evaluation.validation import Validation, check_stop
from trainer.generate.generate import attention_of
from trainer.generate.samples import continue_prompts, encode_prompts
from trainer.parallel.grid import Grid
from trainer.process.errors import TaskError
from trainer.process.heartbeat import Heartbeat
from trainer.process.signals import StopRequest
from trainer.step import StepResult


class Evaluations:
    """The evaluations of a run, opened before its model is built; all ranks make them together.

    Attributes:
        validation: None where the shards have no validation text.

    Raises DataError and TaskError where something is not there, ConfigError for prompts that are
    too long.
    """

    def __init__(
        self,
        config: RunConfig,
        grid: Grid,
        tokenizer: Tokenizer,
        stop: StopRequest,
        heartbeat: Heartbeat,
        has_text: bool,
        log: Callable[[str], None],
    ) -> None:
        self._config, self._grid, self._tokenizer = config, grid, tokenizer
        self._stop, self._heartbeat, self._log = stop, heartbeat, log
        encode_prompts(config, tokenizer)  # may raise
        self.validation: Validation | None = None
        if has_text:
            self.validation = Validation(config, grid, stop, heartbeat, tokenizer)
        self._tasks: Tasks | None = None
        if config.evaluation.tasks:
            self._tasks = Tasks(config.evaluation, grid, grid.pipeline.size)

    def are_due(self, step: int) -> bool:
        """Whether anything is measured after a step."""
        return self._losses_are_due(step) or self._tasks_are_due(step)

    def run(self, engine: Engine, phase: Phase, step: int, result: StepResult) -> None:
        """Adds to the result what is due after a step. Raises EvaluationStopped on all ranks."""
        is_due = self._losses_are_due(step)
        if self.validation is not None and is_due:
            evaluation = self.validation.evaluate(engine)
            result.validation_loss = evaluation.loss
            result.validation_bits_per_byte = evaluation.bits_per_byte
            if (by_source := self.validation.by_source(engine)) is not None:
                result.validation_by_source = by_source.losses
                result.validation_bits_per_byte_by_source = by_source.bits_per_byte
        if is_due:
            result.samples = self._continue_prompts(engine, phase)
        if self._tasks is not None and self._tasks_are_due(step):
            result.tasks = self._evaluate_tasks(self._tasks, engine, phase)

    def _losses_are_due(self, step: int) -> bool:
        settings = self._config.evaluation
        has_any = self.validation is not None or bool(settings.prompts)
        return has_any and self._is_due(settings.every, step)

    def _tasks_are_due(self, step: int) -> bool:
        return self._tasks is not None and self._is_due(self._config.evaluation.task_interval, step)

    def _is_due(self, every: int, step: int) -> bool:
        return step == self._config.recipe.steps or (every > 0 and step % every == 0)

    def _continue_prompts(self, engine: Engine, phase: Phase) -> dict[str, str] | None:
        """Returns what the model makes of the prompts of `evaluation`; None without any."""
        if not self._config.evaluation.prompts:
            return None
        beat = partial(self._heartbeat.enter, "continuing prompts")
        beat()
        may_stop = partial(check_stop, self._stop, self._grid, "while it continued prompts")
        with engine.computing():
            return continue_prompts(
                self._config, engine.model, phase, self._tokenizer, self._grid, may_stop, beat
            )

    def _evaluate_tasks(
        self, tasks: Tasks, engine: Engine, phase: Phase
    ) -> dict[str, float] | None:
        """Returns the scores by task/metric; None, and a line in the log, where lm-eval fails."""
        sizes = RowSizes(self._config.data.seq_len, self._config.data.micro_batch_size)
        model = SharedModel(
            engine,
            self._tokenizer,
            attention_of(phase.attention),
            sizes,
            self._stop,
            self._heartbeat,
        )
        try:
            return tasks.evaluate(model) or None
        except TaskError as error:
            self._log(f"warning: tasks were not evaluated: {error}; training continues")
            return None
