"""Work items over processes, or in this process where one is enough, and their progress."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from typing import TypeVar

from data.activity import Activity
from data.errors import DataError
from data.prepare.work_item import WorkItem
from data.storage import AnyPath
from data.text import Tokenizer

R = TypeVar("R")
_BYTES_PER_PROCESS = 16 << 20  # opening a tokenizer takes as long as a few megabytes of work

_tokenizers: dict[AnyPath, Tokenizer] = {}  # cache of a worker process


def run_items(
    items: list[WorkItem],
    tokenizer: Tokenizer,
    workers: int,
    work: Callable[..., R],
    advance: Callable[[WorkItem, int], None],
) -> Iterator[tuple[WorkItem, R]]:
    """Yields each work item with the result of `work`, as items finish.

    Arguments:
        tokenizer: each worker process opens its own copy.
        workers: max number of processes.
        work: called as work(item, tokenizer, advance=…); must be picklable.
        advance: called with the bytes processed: per batch in this process, per item from others.

    Raises DataError where a worker dies; the first error of an item cancels those not yet started.
    """
    size = sum(item.size if item.files else _BYTES_PER_PROCESS for item in items)
    workers = min(workers, len(items), 1 + size // _BYTES_PER_PROCESS)
    if workers <= 1:
        for item in items:
            yield item, work(item, tokenizer, advance=partial(advance, item))
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    # Forked from a server that does the imports, ten seconds of a core, once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.prepare.worker_imports"])
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (threads,))
    try:
        jobs = {pool.submit(_work, work, item, tokenizer.path): item for item in items}
        for job in as_completed(jobs):
            record = job.result()
            advance(jobs[job], jobs[job].size)
            yield jobs[job], record
    except BrokenProcessPool as error:
        raise DataError(
            "a process that made shards was killed, perhaps out of memory; set fewer "
            "`data.prepare_workers` and run the command again, it resumes where it stopped."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker(threads: int) -> None:
    """Divides the cores among the workers, and ends with the parent even if that is killed."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(work: Callable[..., R], item: WorkItem, path: AnyPath) -> R:
    if path not in _tokenizers:
        _tokenizers[path] = Tokenizer(path)
    return work(item, _tokenizers[path], advance=lambda _size: None)


class Progress:
    """A progress bar per source with the bytes done and the time left.

    The total is the size of the files, exact for plain text and an estimate for other formats.
    Where stderr is no terminal, lines report the bytes of all sources together.

    Arguments:
        verb: the work, shown before the source's name.
        visible: print nothing where False.
    """

    def __init__(self, items: list[WorkItem], verb: str, visible: bool) -> None:
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
        for item in items:
            sizes[item.source.name] = sizes.get(item.source.name, 0) + item.size
        self.tasks = {
            name: self.bar.add_task(f"{verb} {name}", total=size or None)
            for name, size in sizes.items()
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

    def advance(self, item: WorkItem, size: int) -> None:
        """Adds `size` bytes to the progress of an item's source."""
        self.bar.update(self.tasks[item.source.name], advance=size)
        self.lines.advance(size / 1e6)
