"""Files of tasks: prompts to train on and to measure with, and answered conversations."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from data.files import write_atomically
from data.text.messages import EFFORTS
from trainer.post.tasks.domains import DOMAINS, Task
from trainer.process.errors import PostTrainingError

_REPEATED = 200
"""Draws one after the other of known tasks, after which there seem to be no more."""


def draw_tasks(domain: str, seed: int, count: int) -> list[Task]:
    """Draws tasks of a domain with different questions; the first ones do not depend on `count`.

    Raises PostTrainingError where the domain has not as many.
    """
    random = Random(f"{domain} {seed}")
    tasks: dict[str, Task] = {}
    repeated = 0
    while len(tasks) < count:
        task = DOMAINS[domain].draw(random)
        repeated = repeated + 1 if task.key in tasks else 0
        if repeated == _REPEATED:
            raise PostTrainingError(
                f"{domain} has hardly more than {len(tasks):,} tasks, fewer than {count:,}"
            )
        tasks.setdefault(task.key, task)
    return list(tasks.values())


def write_tasks(folder: Path, seed: int, test: int, train: int, answered: int) -> None:
    """Writes three files of every domain, in which no question occurs twice.

    `NAME.test.jsonl` and `NAME.train.jsonl` are prompts, to measure with and to sample answers to.
    `NAME.answered.jsonl` is training data of `content: conversation`: further questions, each
    answered in all modes of thinking.
    """
    for name in DOMAINS:
        tasks = draw_tasks(name, seed, test + train + answered)
        prompts = [{"messages": task.messages, **task.fields} for task in tasks]
        _write(folder / f"{name}.test.jsonl", prompts[:test])
        _write(folder / f"{name}.train.jsonl", prompts[test : test + train])
        rest = tasks[test + train :]
        records = [task.answered(effort) for task in rest for effort in EFFORTS]
        _write(folder / f"{name}.answered.jsonl", records)


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
