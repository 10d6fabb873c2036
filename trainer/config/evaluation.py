"""Settings of evaluations during training. Imports no torch."""

from typing import Annotated, Self

from pydantic import Field, NonNegativeInt, PositiveInt

from data.storage import absolute
from trainer.config.section import Section

TASK_FILES = (".yaml", ".yml")
"""Endings of paths of task files; every other text is the name of a task."""


def is_task_file(task: str) -> bool:
    """Whether an entry of `evaluation.tasks` is the path of a file."""
    return task.endswith(TASK_FILES)


class EvaluationConfig(Section):
    """Loss on the validation split during training, samples, and tasks."""

    every: NonNegativeInt = 1000
    """Interval of evaluations; 0 evaluates only after the last step. [steps]"""
    max_rows: PositiveInt | None = 1024
    """Maximum number of validation rows, in training and in `v4 eval`; null reads all of them.
    [rows]"""
    per_source: bool = True
    """Also log the loss of each source where there are several; `max_rows` is divided among
    them."""
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that the model continues at every evaluation, with the most likely tokens; they are in
    metrics.jsonl, on wandb and in the report."""
    prompt_tokens: PositiveInt = 64
    """Maximum number of tokens of a continuation. [tokens]"""
    tasks: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Tasks of EleutherAI's lm-eval: names, as hellaswag, or paths of task files in its format, as
    my/task.yaml (docs/evaluation.md). They need `pip install v4-pretrain[eval]`."""
    tasks_every: NonNegativeInt | None = None
    """Interval at which the tasks are evaluated; 0 evaluates them only after the last step, null
    at every evaluation. [steps]"""
    task_fewshot: NonNegativeInt | None = None
    """Solved examples before each question; null: as many as each task defines. [examples]"""
    task_limit: PositiveInt | None = None
    """Maximum number of questions of each task, its first ones; null: all of them. [questions]"""
    task_bos: bool = False
    """Begin every text of a task with bos, as documents of the training data do; lm-eval's `hf`
    backend does not, for this tokenizer."""
    task_code: bool = False
    """Let task files run your own Python code, which their `!function` names."""

    @property
    def task_interval(self) -> int:
        """`tasks_every`, or the interval of evaluations where it is null."""
        return self.every if self.tasks_every is None else self.tasks_every

    def with_absolute_paths(self) -> Self:
        """Returns the same settings with paths that mean the same from any working directory."""
        tasks = tuple(str(absolute(task)) if is_task_file(task) else task for task in self.tasks)
        return self.model_copy(update={"tasks": tasks})
