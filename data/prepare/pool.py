"""Units of work over processes, in this process where one is enough, and the progress of it."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import TypeVar

from data.errors import DataError
from data.prepare.work_item import Unit
from data.text import Tokenizer

R = TypeVar("R")
_BYTES_A_PROCESS = 16 << 20  # opening a tokenizer takes as long as a few megabytes of work

_tokenizers: dict[Path, Tokenizer] = {}  # of a worker process: one, loaded once


def run_units(
    units: list[Unit],
    tokenizer: Tokenizer,
    workers: int,
    work: Callable[..., R],
    advance: Callable[[Unit, int], None],
) -> Iterator[tuple[Unit, R]]:
    """Yield each unit with its record as it is done; `work` is a function of a unit, a tokenizer
    and `advance`, with its settings.

    `advance` is told the bytes done: of documents in this process, of whole units from others.
    Raises DataError where a worker dies; the first error of a unit ends the others unbegun.
    """
    size = sum(unit.size if unit.files else _BYTES_A_PROCESS for unit in units)
    workers = min(workers, len(units), 1 + size // _BYTES_A_PROCESS)
    if workers <= 1:
        for unit in units:
            yield unit, work(unit, tokenizer, advance=partial(advance, unit))
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    # Forked from a server that does the imports, ten seconds of a core, once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.prepare.worker_imports"])
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (threads,))
    try:
        jobs = {pool.submit(_work, work, unit, tokenizer.path): unit for unit in units}
        for job in as_completed(jobs):
            record = job.result()
            advance(jobs[job], jobs[job].size)
            yield jobs[job], record
    except BrokenProcessPool as error:
        raise DataError(
            "a process that made shards was killed, perhaps for want of memory; set fewer "
            "`data.prepare_workers` and run the command again, it goes on where it stopped."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker(threads: int) -> None:
    """Share the cores among the workers, and end with the parent even where that was killed."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(work: Callable[..., R], unit: Unit, path: Path) -> R:
    if path not in _tokenizers:
        _tokenizers[path] = Tokenizer(path)
    return work(unit, _tokenizers[path], advance=lambda _size: None)


class Progress:
    """A line per source with the bytes done and the time left; silent where not wanted.

    `verb` says what is done.

    The total is the size of the files, exact for plain text and an estimate for the other formats.
    """

    def __init__(self, units: list[Unit], verb: str, visible: bool) -> None:
        from rich import progress
        from rich.console import Console

        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not visible,
        )
        sizes: dict[str, int] = {}
        for unit in units:
            sizes[unit.source.name] = sizes.get(unit.source.name, 0) + unit.size
        self.tasks = {
            name: self.bar.add_task(f"{verb} {name}", total=size or None)
            for name, size in sizes.items()
        }

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, unit: Unit, size: int) -> None:
        """Count `size` more bytes of a unit's source."""
        self.bar.update(self.tasks[unit.source.name], advance=size)
