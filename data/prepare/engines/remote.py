"""Engines whose processes run on other hosts, which share the folder of the preparation.

The driver writes lists of tasks into `engine/` in that folder, and the processes, their reports.
"""

import secrets
import shutil
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data.prepare.engines.attempts import Attempts, WorkerDiedError
from data.prepare.engines.engine import Advance, Engine, run_here, worthwhile_processes
from data.prepare.engines.kinds import read_preparation, read_tasks, write_preparation, write_tasks
from data.prepare.engines.worker import LOGS, Report, read_report, run_tasks
from data.prepare.task import Preparation, Task

NOBODYS_FAULT = ""
"""How a job ended whose tasks lose no attempt by it."""
_FILES = "engine"


@dataclass
class Job:
    """Some tasks for one process.

    Attributes:
        name: of its files.
        shown: bytes of each task that are in the progress.
    """

    name: str
    tasks: list[Task]
    shown: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.shown = [0] * len(self.tasks)


class RemoteEngine(Engine):
    """Gives jobs to a cluster until all tasks are done."""

    def __init__(self, preparation: Preparation, visible: bool) -> None:
        super().__init__(preparation, visible)
        # Of its own: a process of an earlier engine, which its host lost, may still write a report.
        self.files = preparation.folder / _FILES / secrets.token_hex(4)
        self.count = 0

    def _run(self, tasks: list[Task], attempts: Attempts, advance: Advance) -> None:
        waiting = deque(tasks)
        if worthwhile_processes(tasks) == 1:
            run_here(self.preparation, waiting, attempts, advance)
            return
        if not self.count:
            shutil.rmtree(self.files.parent, ignore_errors=True)  # of earlier engines
            write_preparation(self.files, self.preparation)
            (self.preparation.folder / LOGS).mkdir(exist_ok=True)
        running: dict[str, Job] = {}
        while waiting or running:
            for job in self._submit(waiting, len(running)):
                running[job.name] = job
            ended = self._wait(running)
            for job in running.values():
                report = read_report(self._report(job.name))
                self._show(job, report or Report(), advance)
                if job.name in ended:
                    waiting += self._conclude(job, report, ended[job.name], attempts, advance)
            for name in ended:
                del running[name]

    @abstractmethod
    def _submit(self, waiting: deque[Task], running: int) -> Iterable[Job]:
        """Takes tasks and gives them to the cluster, as many as it should have.

        Arguments:
            running: number of jobs that it has.
        """

    @abstractmethod
    def _wait(self, running: dict[str, Job]) -> dict[str, str]:
        """Waits for some seconds; returns what is known of how jobs ended, by their names."""

    def _job(self, tasks: list[Task]) -> Job:
        """A job, and the file that its process starts from."""
        job = Job(f"{self.count:06d}", tasks)
        self.count += 1
        write_tasks(self.files / f"{job.name}.json", tasks)
        return job

    def _report(self, name: str) -> Path:
        return _report_file(self.files, name)

    def _show(self, job: Job, report: Report, advance: Advance) -> None:
        """Adds to the progress what the job has processed since the last report."""
        for position, task in enumerate(job.tasks):
            size = 0
            if position < report.position:
                size = task.size
            elif position == report.position:
                size = min(report.processed, task.size)
            advance(task, size - job.shown[position])
            job.shown[position] = size

    def _conclude(
        self, job: Job, report: Report | None, end: str, attempts: Attempts, advance: Advance
    ) -> list[Task]:
        """The tasks of a job to be run once more; raises what ends the work."""
        again = []
        failures = {} if report is None else {f.position: f.error() for f in report.failures}
        position = 0 if report is None else report.position
        if position == len(job.tasks):  # all done there, and not here: the first is to blame
            position = 0
        blames = end != NOBODYS_FAULT
        for number, task in enumerate(job.tasks):
            if task.is_done(self.preparation.folder):
                advance(task, task.size - job.shown[number])
                continue
            advance(task, -job.shown[number])
            error = failures.get(number)
            if error is None and blames and number >= position:
                error, blames = WorkerDiedError(end), False
            if error is None or attempts.record_failure(task, error):
                again.append(task)
        return again


def run_job(files: Path, name: str, preparation: Preparation) -> None:
    """Runs the tasks of a job in this process."""
    run_tasks(read_tasks(files / f"{name}.json"), preparation, _report_file(files, name))


def open_preparation(files: Path) -> Preparation:
    """What the tasks of all jobs share; FileNotFoundError on a host that does not see it."""
    return read_preparation(files, files.parents[1])


def _report_file(files: Path, name: str) -> Path:
    return files / f"{name}.report.json"


def remove_engine_files(folder: Path) -> None:
    """Removes the logs of tasks, and what engines need, from the folder of a preparation."""
    for name in (_FILES, LOGS):
        shutil.rmtree(folder / name, ignore_errors=True)
