"""The optuna study of a sweep: one journal file that processes on several hosts share."""

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock, JournalStorage
from sqlalchemy.exc import SQLAlchemyError

from launch.sweep_file import Sweep
from trainer.config import ConfigError

JOURNAL = "study.journal"
_DATABASE = "study.sqlite3"
"""Of sweeps from before version 0.2."""
_NAME = "sweep"


def open_study(folder: Path) -> tuple[optuna.Study, JournalStorage]:
    """Opens the study of a sweep's folder. Raises ConfigError for a damaged journal."""
    path = folder / JOURNAL
    _check_lines(path)
    storage = _storage(path)
    return optuna.load_study(study_name=_NAME, storage=storage), storage


def create_study(sweep: Sweep, folder: Path) -> None:
    """Writes the journal with all trials of the sweep waiting, unless there is one.

    The trials of an earlier version's database are taken over. Only one process may call it at a
    time. Raises ConfigError for a damaged database.
    """
    if (folder / JOURNAL).is_file():
        return
    partial = folder / f".{JOURNAL}.partial"
    partial.unlink(missing_ok=True)
    study = optuna.create_study(
        study_name=_NAME, storage=_storage(partial), direction=sweep.metric.goal
    )
    if (folder / _DATABASE).is_file():
        with _database_errors(folder / _DATABASE):
            old = optuna.load_study(study_name=_NAME, storage=f"sqlite:///{folder / _DATABASE}")
            study.add_trials(old.get_trials(deepcopy=False))
    started = len(study.get_trials(deepcopy=False))
    for settings in _settings(sweep, started):
        study.enqueue_trial(settings)
    partial.rename(folder / JOURNAL)


def _settings(sweep: Sweep, first: int) -> Iterable[dict[str, Any]]:
    """Yields what is fixed of every trial from number `first` on: all of a grid's point."""
    if sweep.method != "grid":
        yield from ({} for _ in range(first, sweep.trials))
        return
    for number, point in enumerate(sweep.points()):
        if first <= number < sweep.trials:
            yield {name: json.dumps(value) for name, value in point.items()}


def _storage(path: Path) -> JournalStorage:
    optuna.logging.set_verbosity(logging.WARNING)
    return JournalStorage(JournalFileBackend(str(path), JournalFileSymlinkLock(str(path))))


def _check_lines(path: Path) -> None:
    """Removes a last line that a crash has torn, to which the next one would be appended.

    Raises ConfigError for any other damage.
    """
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        size = 0
        lines = path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            is_record = False
            with suppress(ValueError):
                is_record = isinstance(json.loads(line), dict)
            if not (is_record and line.endswith(b"\n")):
                if 1 < number == len(lines) and line.startswith(b"{"):
                    break
                raise ConfigError(f"{path}: line {number} is damaged; restore the file")
            size += len(line)
        with path.open("r+b") as file:
            file.truncate(size)
    finally:
        lock.release()


@contextmanager
def _database_errors(path: Path) -> Iterator[None]:
    """Turns errors of the database into one sentence. Raises ConfigError."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError, KeyError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        reason = str(getattr(cause, "orig", None) or cause)
        raise ConfigError(f"{path}: {reason}") from None
