"""Tasks, and what they share, as files from which processes on other hosts start.

A file names one of the kinds of tasks below, so that reading it runs nothing else.
"""

import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from data.config import DataConfig
from data.errors import DataError, first_problem
from data.files import write_atomically
from data.prepare.dedup import AnyDedupTask
from data.prepare.filter_pass import FilterTask
from data.prepare.task import Preparation, Task
from data.prepare.work_item import WorkItem
from data.prepare.write_part import WritePartTask
from data.text import Tokenizer

_TASKS: TypeAdapter[list[Any]] = TypeAdapter(
    list[Annotated[FilterTask | WritePartTask | AnyDedupTask, Field(discriminator="kind")]]
)
_ITEMS = TypeAdapter(tuple[WorkItem, ...])
_PREPARATION = "preparation.json"


def write_tasks(file: Path, tasks: Sequence[Task]) -> None:
    """Writes tasks for `read_tasks`."""
    _write(file, [task.model_dump(mode="json") for task in tasks])


def read_tasks(file: Path) -> list[Task]:
    """The tasks in a file."""
    return _read(file, _TASKS)


def write_preparation(folder: Path, preparation: Preparation) -> None:
    """Writes what tasks share into `folder`."""
    items = _ITEMS.dump_python(preparation.items, mode="json")
    config = preparation.config.model_dump(mode="json")
    _write(folder / _PREPARATION, {"config": config, "items": items})


def read_preparation(folder: Path, results: Path) -> Preparation:
    """What tasks share, from `folder`; `results` is where they leave theirs."""
    fields = _read(folder / _PREPARATION, TypeAdapter(dict[str, Any]))
    config = DataConfig.model_validate(fields["config"])
    open_tokenizer = cache(partial(Tokenizer, config.tokenizer.path))
    items = _ITEMS.validate_python(fields["items"])
    return Preparation(config, results, items, open_tokenizer)


def _write(file: Path, value: Any) -> None:
    # Names of files that are not UTF-8 have surrogates, which the escapes of `json` keep.
    write_atomically(file, json.dumps(value))


def _read(file: Path, adapter: TypeAdapter[Any]) -> Any:
    try:
        return adapter.validate_python(json.loads(file.read_bytes()))
    except ValidationError as error:
        raise DataError(f"{file} is damaged ({first_problem(error)}).") from error
