"""What all engines share: which tasks are left, how often each is attempted, and the progress."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence

from data.errors import DataError
from data.prepare.engines.progress import Progress
from data.prepare.task import Preparation, Task

Advance = Callable[[Task, int], None]


class Engine(ABC):
    """Runs tasks of one preparation.

    Arguments:
        preparation: what its tasks share.
        visible: whether the progress is shown on stderr.
    """

    def __init__(self, preparation: Preparation, visible: bool) -> None:
        self.preparation, self.visible = preparation, visible

    def run(self, tasks: Sequence[Task], verb: str) -> None:
        """Runs the tasks that are not done yet; returns when all are.

        Arguments:
            verb: the work, as the progress names it.

        Raises the error of a task that bad input fails, or that fails in its last attempt.
        """
        folder = self.preparation.folder
        with Progress(tasks, verb, self.visible) as progress:
            remaining = []
            for task in tasks:
                if task.is_done(folder):
                    progress.advance(task, task.size)
                else:
                    remaining.append(task)
            if remaining:
                attempts = Attempts(self.preparation.config.task_attempts)
                self._run(remaining, attempts, progress.advance)

    @abstractmethod
    def _run(self, tasks: list[Task], attempts: "Attempts", advance: Advance) -> None:
        """Runs tasks until none of them is to be attempted any more.

        Arguments:
            advance: called with the bytes that a task has processed.
        """


class WorkerDiedError(Exception):
    """A process that ended before its task did."""


class Attempts:
    """Counts the failed attempts at each task, of which each may have `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.failures: Counter[str] = Counter()

    def record_failure(self, task: Task, error: Exception) -> None:
        """Returns where the task is to be attempted again, and raises its error otherwise.

        Bad input and mistakes of a program fail each time in the same way.
        """
        if not isinstance(error, OSError | WorkerDiedError):
            raise error
        self.failures[task.name] += 1
        if self.failures[task.name] < self.limit:
            return
        if isinstance(error, OSError):
            text = f"{task.name}: {error.strerror or error}, in {self.limit} attempts"
            raise OSError(error.errno, text) from error
        raise DataError(
            f"a process that made shards was killed at {task.name}, in {self.limit} attempts, "
            "perhaps out of memory; set fewer `data.prepare_workers` and run the command again, "
            "it resumes where it stopped."
        ) from error
