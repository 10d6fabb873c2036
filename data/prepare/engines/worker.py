"""The work of a process on any host: some tasks, with a log of each and a report on all."""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from data.config import Section
from data.errors import DataError
from data.prepare.engines.attempts import may_pass
from data.prepare.task import Preparation, Task

LOGS = "logs"
_REPORT_SECONDS = 1.0


class Failure(Section):
    """An error of the task at a position; `errno` is that of an OSError."""

    position: int
    text: str
    is_system_error: bool = False
    errno: int | None = None

    @classmethod
    def of(cls, position: int, task: Task, error: Exception) -> "Failure":
        """From an error of the task."""
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(error, OSError):
            text = error.strerror or str(error)
        elif isinstance(error, DataError):
            text = str(error)
        else:
            text = f"{task.name} failed with {type(error).__name__}: {error}"
        is_system_error = isinstance(error, OSError)
        errno = cause.errno if isinstance(cause, OSError) else None
        return cls(position=position, text=text, is_system_error=is_system_error, errno=errno)

    def error(self) -> Exception:
        """An error like that of the task."""
        if self.is_system_error:
            return OSError(self.errno, self.text)
        error = DataError(self.text)
        if self.errno is not None:
            error.__cause__ = OSError(self.errno, self.text)
        return error


class Report(Section):
    """How far a process has come in a list of tasks.

    Attributes:
        position: of the task that is being run; the number of tasks once all were.
        processed: bytes of that task.
    """

    position: int = 0
    processed: int = 0
    failures: tuple[Failure, ...] = ()


def run_tasks(tasks: list[Task], preparation: Preparation, file: Path) -> Report:
    """Runs the tasks that are not done, one after the other; the report is kept in `file`.

    After bad input, and what a program does wrong, the remaining tasks are not run.
    """
    reporter = _Reporter(file)
    for position, task in enumerate(tasks):
        reporter.begin(position)
        if task.is_done(preparation.folder):
            continue
        try:
            with task_log(task, preparation.folder, redirect=True):
                task.run(preparation, reporter.advance)
        except Exception as error:
            reporter.failures.append(Failure.of(position, task, error))
            if not may_pass(error):
                break
    else:
        reporter.begin(len(tasks))
    return reporter.write()


@contextmanager
def task_log(task: Task, folder: Path, redirect: bool) -> Iterator[None]:
    """Logs when a task begins and ends, and its error, in `logs/NAME.log`.

    Arguments:
        redirect: what the process prints meanwhile is in the log as well.
    """
    path = folder / LOGS / f"{task.name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with path.open("a", buffering=1, errors="backslashreplace") as stream:
        if redirect:
            restore = _redirect(stream.fileno())
        stream.write(f"{_now()} {socket.gethostname()} process {os.getpid()}: begins\n")
        try:
            yield
            stream.write(f"{_now()} done in {time.monotonic() - start:.1f} s\n")
        except BaseException:
            stream.write(f"{_now()} failed after {time.monotonic() - start:.1f} s\n")
            traceback.print_exc(file=stream)
            raise
        finally:
            if redirect:
                restore()


def _redirect(target: int) -> Callable[[], None]:
    """Sends stdout and stderr, also of compiled code, to a file; returns what undoes that."""
    copies = {}
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for number in (1, 2):
        copies[number] = os.dup(number)
        os.dup2(target, number)

    def restore() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, copy in copies.items():
            os.dup2(copy, number)
            os.close(copy)

    return restore


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


class _Reporter:
    """Keeps a Report in a file, which appears whole and is replaced about once a second."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.position = self.processed = 0
        self.failures: list[Failure] = []
        self._written = 0.0

    def begin(self, position: int) -> None:
        self.position, self.processed = position, 0
        self.write()

    def advance(self, size: int) -> None:
        self.processed += size
        if time.monotonic() > self._written + _REPORT_SECONDS:
            self.write()

    def write(self) -> Report:
        report = Report(
            position=self.position, processed=self.processed, failures=tuple(self.failures)
        )
        partial = self.file.with_name(f".{self.file.name}")
        partial.write_text(report.model_dump_json())
        os.replace(partial, self.file)
        self._written = time.monotonic()
        return report


def read_report(file: Path) -> Report | None:
    """The report in a file; None where there is none yet, or none that can be read now."""
    try:
        return Report.model_validate_json(file.read_bytes())
    except OSError:  # also of a network file system, while another host replaces the file
        return None
