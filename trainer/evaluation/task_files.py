"""Users' task files in lm-eval's format: YAML that names local data and runs no code."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import yaml

from trainer.process.errors import TaskError

LOCAL_FORMATS = ("arrow", "csv", "json", "parquet", "text")
"""Values of `dataset_path` that read `data_files`."""
_RUN_CODE = ("class", "custom_dataset", "unsafe_code", "use_prompt")
"""Keys by which lm-eval would run what a file names."""
_PICKLED = ("pandas",)


class _Loader(yaml.SafeLoader):
    """Reads plain values; a tag such as !function is an error."""


def read_task_file(path: Path) -> dict[str, Any]:
    """Returns the task of a file and of those that it includes, its data files as absolute paths.

    Relative paths in a file are relative to its folder. Raises TaskError where the file
    does not exist, is not a task, would run code, or names missing data.
    """
    task = _read(path, ())
    if not isinstance(task.get("task"), str | list) and not isinstance(task.get("group"), str):
        raise TaskError(f"{path}: has no key 'task' with a name; it should be a task of lm-eval")
    members = task.get("task")
    if isinstance(members, list) and not all(isinstance(name, str) for name in members):
        raise TaskError(f"{path}: task has a task in itself; name its file in evaluation.tasks")
    for key in _RUN_CODE:
        if task.get(key):
            raise TaskError(f"{path}: {key} would run code; {_ALLOW}")
    if task.get("dataset_path") in _PICKLED:
        raise TaskError(f"{path}: dataset_path = {task['dataset_path']} reads pickles; use parquet")
    return task


_ALLOW = "evaluation.task_code = true, or --task-code, allows it"


def _read(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    if path in including:
        raise TaskError(f"{path}: includes itself")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise TaskError(f"{path}: this task file is not there") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: {_yaml_problem(error)}") from None
    if not isinstance(values, dict):
        raise TaskError(f"{path}: should be a mapping of lm-eval's keys, such as 'task'")
    make_paths_absolute(values, path)
    included = values.pop("include", [])
    merged: dict[str, Any] = {}
    for other in included if isinstance(included, list) else [included]:
        merged |= _read(path.parent / str(other), (*including, path))
    return merged | values


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.constructor.ConstructorError) and error.problem_mark is not None:
        where = f"line {error.problem_mark.line + 1}"
        return f"{where}: a tag such as !function would run code; {_ALLOW}"
    return f"is no YAML: {' '.join(str(error).split())}"


def make_paths_absolute(values: dict[str, Any], path: Path) -> None:
    """Resolves `data_files` of a local format. Raises TaskError where there is no such file."""
    arguments = values.get("dataset_kwargs")
    if not isinstance(arguments, dict) or "data_files" not in arguments:
        if values.get("dataset_path") in LOCAL_FORMATS:
            raise TaskError(
                f"{path}: dataset_path = {values['dataset_path']} needs the files of its data, as "
                "dataset_kwargs: {data_files: my.jsonl}"
            )
        return
    arguments["data_files"] = _absolute(arguments["data_files"], path)


def _absolute(files: Any, path: Path) -> Any:
    if isinstance(files, dict):
        return {split: _absolute(inner, path) for split, inner in files.items()}
    if isinstance(files, list):
        return [_absolute(inner, path) for inner in files]
    text = str(files)
    if "://" in text:
        return text
    absolute = str((path.parent / Path(text).expanduser()).absolute())
    if not glob.glob(absolute):
        raise TaskError(f"{path}: its data file {absolute} is not there")
    return absolute
