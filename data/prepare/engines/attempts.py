"""How often a task is attempted, and what follows when it failed each time."""

import sys
from collections import Counter
from pathlib import Path

from data.activity import print_line
from data.config import DataConfig
from data.errors import DataError
from data.prepare.task import Task

_INPUT = FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError


class WorkerDiedError(Exception):
    """A process that ended before its task did; the message has what is known about it."""


class Attempts:
    """Counts the failed attempts at each task, and gives a task up after the last.

    Arguments:
        logs: where tasks log.

    Attributes:
        given_up: the reason, by the name of the task.
    """

    def __init__(self, config: DataConfig, logs: Path) -> None:
        self.logs = logs
        self.limit = config.task_attempts
        self.quarantines = config.failed_tasks == "quarantine"
        self.failures: Counter[str] = Counter()
        self.given_up: dict[str, str] = {}

    def record_failure(self, task: Task, error: Exception) -> bool:
        """Returns whether the task is to be attempted again; raises where the work ends.

        Bad input and mistakes of a program fail each time in the same way, so that the first
        attempt is the last.
        """
        if not may_pass(error):
            raise error
        self.failures[task.name] += 1
        count = self.failures[task.name]
        reason = _reason(error)
        if count < self.limit:
            print_line(
                f"v4: {task.name} failed ({reason}), attempt {count} of {self.limit}", sys.stderr
            )
            return True
        if self.quarantines:
            self.given_up[task.name] = reason
            print_line(f"v4: {task.name} failed ({reason}) and is left out", sys.stderr)
            return False
        failed = f"in {self.limit} attempts" if self.limit > 1 else "in its only attempt"
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{task.name}: {reason}, {failed}") from error
        if isinstance(error, DataError):
            raise error
        raise DataError(
            f"{task.name}: {reason}, {failed} (logged in {self.logs}); run the command again, it "
            "resumes where it stopped."
        ) from error


def may_pass(error: Exception) -> bool:
    """Whether the next attempt may succeed: a process died, or a file system failed."""
    if isinstance(error, OSError | WorkerDiedError):
        return True
    cause = error.__cause__ if isinstance(error, DataError) else None
    # Decoders raise OSError without a number for data that is not what they expect.
    return isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, _INPUT)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error).rstrip(".")
