"""The processes of this machine, or this process where one is enough."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path

from data.config import DataConfig
from data.prepare.engines.attempts import Attempts, WorkerDiedError
from data.prepare.engines.engine import Advance, Engine, run_here, worthwhile_processes
from data.prepare.engines.worker import task_log
from data.prepare.task import Preparation, Task
from data.prepare.work_item import WorkItem
from data.text import Tokenizer

_KILLED = (
    "a process that made shards was killed, perhaps out of memory (set fewer "
    "`data.prepare_workers`)"
)

_preparation: Preparation  # of a worker process


class LocalEngine(Engine):
    """One process of this machine for each of `data.prepare_workers`, by default for each core."""

    def _run(self, tasks: list[Task], attempts: Attempts, advance: Advance) -> None:
        workers = self.preparation.config.prepare_workers or os.cpu_count() or 1
        workers = min(workers, len(tasks), worthwhile_processes(tasks))
        if workers == 1:
            run_here(self.preparation, deque(tasks), attempts, advance)
            return
        threads = max(1, (os.cpu_count() or 1) // workers)
        with ExitStack() as stack:
            idle = [stack.enter_context(_worker(self.preparation, threads)) for _ in range(workers)]
            self._run_in(idle, deque(tasks), attempts, advance)

    def _run_in(
        self, idle: list["_Worker"], waiting: deque[Task], attempts: Attempts, advance: Advance
    ) -> None:
        """Runs tasks in worker processes; the first error ends those that are not started."""
        running: dict[Future[None], tuple[_Worker, Task]] = {}
        while waiting or running:
            while waiting and idle:
                worker, task = idle.pop(), waiting.popleft()
                running[worker.submit(task)] = worker, task
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                worker, task = running.pop(future)
                idle.append(worker)
                error = future.exception()
                if error is None:
                    advance(task, task.size)
                    continue
                if isinstance(error, BrokenProcessPool):
                    worker.restart()
                    error = WorkerDiedError(_KILLED)
                assert isinstance(error, Exception)
                if attempts.record_failure(task, error):
                    waiting.append(task)


@contextmanager
def _worker(preparation: Preparation, threads: int) -> Iterator["_Worker"]:
    worker = _Worker(preparation, threads)
    try:
        yield worker
    finally:
        worker.pool.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """A process that runs one task at a time; one of its own pool, whose end concerns no other."""

    def __init__(self, preparation: Preparation, threads: int) -> None:
        # Forked from a server that does the imports, ten seconds of a core, once for all workers.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["data.prepare.worker_imports"])
        items = preparation.items
        self.arguments = preparation.config, preparation.folder, items, threads
        self.restart()

    def restart(self) -> None:
        """Starts a new process with the next task."""
        self.pool = ProcessPoolExecutor(1, self.context, _begin_worker, self.arguments)

    def submit(self, task: Task) -> Future[None]:
        try:
            return self.pool.submit(_work, task)
        except BrokenProcessPool:  # it was killed while it had nothing to do
            self.restart()
            return self.pool.submit(_work, task)


def _begin_worker(
    config: DataConfig, folder: Path, items: tuple[WorkItem, ...], threads: int
) -> None:
    """Divides the cores among the workers, and ends with the parent even if that is killed."""
    global _preparation
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _preparation = Preparation(
        config, folder, items, cache(partial(Tokenizer, config.tokenizer.path))
    )


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(task: Task) -> None:
    with task_log(task, _preparation.folder, redirect=False):
        task.run(_preparation, lambda _size: None)
