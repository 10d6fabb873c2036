"""The progress of the tasks of a stage."""

from collections.abc import Sequence
from contextlib import suppress

from data.activity import Activity
from data.prepare.task import Task


class Progress:
    """A progress bar per group of tasks with the bytes done and the time left.

    The total is the size of the files, exact for plain text and an estimate for other formats.
    Where stderr is no terminal, lines report the bytes of all groups together.

    Arguments:
        verb: the work, shown before the group's name.
        visible: print nothing where False.
    """

    def __init__(self, tasks: Sequence[Task], verb: str, visible: bool) -> None:
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True)
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not (visible and console.is_terminal),
        )
        sizes: dict[str, int] = {}
        for task in tasks:
            sizes[task.group] = sizes.get(task.group, 0) + task.size
        self.tasks = {
            group: self.bar.add_task(f"{verb} {group}".strip(), total=size or None)
            for group, size in sizes.items()
        }

        total = sum(sizes.values()) / 1e6
        self.lines = Activity(verb, total, "MB", visible and not console.is_terminal)

    def __enter__(self) -> "Progress":
        with suppress(OSError):  # a terminal that has gone
            self.bar.start()
        self.lines.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.__exit__()
        with suppress(OSError):
            self.bar.stop()

    def advance(self, task: Task, size: int) -> None:
        """Adds `size` bytes to the progress of a task's group."""
        self.bar.update(self.tasks[task.group], advance=size)
        self.lines.advance(size / 1e6)

    def skip(self, task: Task) -> None:
        """Adds a task that was done before, from which nothing follows for the time left."""
        self.lines.before += task.size / 1e6
        self.advance(task, task.size)
