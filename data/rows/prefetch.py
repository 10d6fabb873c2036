"""Batches made ahead of their step by a thread, identical to those made without it.

A thread is enough, and shares the cached windows: what takes time in a loader is compiled code that
releases the GIL, or reading files. Every batch is a function of its step, so a run can end, or jump
to any step, and has no queue to save.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from data.rows.loader import Batch


class Prefetcher:
    """Returns the batches of a step while a thread makes those of the next `ahead` steps.

    Arguments:
        at: a rank's microbatches of a step, as `Loader.at`.
        ahead: how many later steps are made while one trains; with 0 no thread is started.
        steps: number of steps of the run; none after the last is made ahead.
        pin: put the tensors into page-locked memory, from which a GPU copies asynchronously.
    """

    def __init__(
        self, at: Callable[[int], list[Batch]], ahead: int, steps: int, pin: bool = False
    ) -> None:
        self._at, self._ahead, self._steps, self._pin = at, ahead, steps, pin
        self._waiting: dict[int, Future[list[Batch]]] = {}
        self._thread = ThreadPoolExecutor(1, "prefetch") if ahead else None

    def at(self, step: int) -> list[Batch]:
        """The microbatches of a step. Raises what the loader raised while making them."""
        if self._thread is None:
            return self._make(step)
        wanted = range(step, max(min(step + self._ahead + 1, self._steps), step + 1))
        for number in [n for n in self._waiting if n not in wanted]:
            self._waiting.pop(number).cancel()
        for number in wanted:
            if number not in self._waiting:
                self._waiting[number] = self._thread.submit(self._make, number)
        return self._waiting.pop(step).result()

    def _make(self, step: int) -> list[Batch]:
        batches = self._at(step)
        if not self._pin:
            return batches
        return [
            replace(b, tokens=b.tokens.pin_memory(), targets=b.targets.pin_memory())
            for b in batches
        ]

    def close(self) -> None:
        """Stops the thread after the step in progress."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
