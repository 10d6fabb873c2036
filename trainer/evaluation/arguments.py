"""The options of `v4 eval`. Imports no torch."""

from __future__ import annotations

import argparse
from typing import Any

from trainer.config import EvaluationConfig


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `v4 eval` to a parser that has the config."""
    parser.add_argument("--tasks", help="names or files of lm-eval's tasks, with commas between")
    parser.add_argument("--limit", type=int, help="questions of each task")
    parser.add_argument("--fewshot", type=int, help="solved examples before each question")
    parser.add_argument("--bos", action="store_true", help="begin every text with bos")
    parser.add_argument("--task-code", action="store_true", help="task files may run Python")
    parser.add_argument("--json", action="store_true", help="a JSON object in place of a table")


def task_settings(settings: EvaluationConfig, options: argparse.Namespace) -> EvaluationConfig:
    """Returns the settings of `evaluation` with what the command line replaces of them."""
    update: dict[str, Any] = {"tasks": tuple(name for name in options.tasks.split(",") if name)}
    if options.limit is not None:
        update["task_limit"] = options.limit
    if options.fewshot is not None:
        update["task_fewshot"] = options.fewshot
    if options.bos:
        update["task_bos"] = True
    if options.task_code:
        update["task_code"] = True
    return settings.model_copy(update=update)
