"""What all engines share: which tasks are left, and the progress."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from data.prepare.engines.attempts import Attempts
from data.prepare.engines.progress import Progress
from data.prepare.engines.worker import LOGS
from data.prepare.task import Preparation, Task

_BYTES_PER_PROCESS = 16 << 20  # starting a process takes as long as some megabytes of work
Advance = Callable[[Task, int], None]


class Engine(ABC):
    """Runs tasks of one preparation; a context that ends what it has started.

    Arguments:
        preparation: what its tasks share.
        visible: whether the progress is shown on stderr.
    """

    def __init__(self, preparation: Preparation, visible: bool) -> None:
        self.preparation, self.visible = preparation, visible

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        return None

    def run(self, tasks: Sequence[Task], verb: str) -> dict[str, str]:
        """Runs the tasks that are not done yet.

        Returns the names of those that failed in every attempt, each with the reason; always empty
        unless `data.failed_tasks` is `quarantine`.

        Arguments:
            verb: the work, as the progress names it.

        Raises the error of a task that bad input fails, or that fails in every attempt.
        """
        folder = self.preparation.folder
        attempts = Attempts(self.preparation.config, folder / LOGS)
        with Progress(tasks, verb, self.visible) as progress:
            remaining = []
            for task in tasks:
                if task.is_done(folder):
                    progress.skip(task)
                else:
                    remaining.append(task)
            if remaining:
                self._run(remaining, attempts, progress.advance)
        return attempts.given_up

    @abstractmethod
    def _run(self, tasks: list[Task], attempts: Attempts, advance: Advance) -> None:
        """Runs tasks until none of them is to be attempted any more.

        Arguments:
            advance: called with the bytes that a task has processed.
        """


def worthwhile_processes(tasks: Sequence[Task]) -> int:
    """How many processes are worth their start; one is this process."""
    return 1 + sum(task.size or _BYTES_PER_PROCESS for task in tasks) // _BYTES_PER_PROCESS


def run_here(
    preparation: Preparation, waiting: deque[Task], attempts: Attempts, advance: Advance
) -> None:
    """Runs tasks in this process, one after the other."""
    while waiting:
        task = waiting.popleft()
        try:
            task.run(preparation, partial(advance, task))
        except Exception as error:
            if attempts.record_failure(task, error):
                waiting.append(task)
