"""Python's garbage collection, done by the loop: on all ranks after the same steps.

Python would collect when it has counted enough new objects, on every rank at another moment of
another step, and all others would wait for that rank each time.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_STEPS = 50


@contextmanager
def collection_by_steps() -> Iterator[Callable[[int], None]]:
    """Yields a function to call after each step, which collects after every 50th.

    What lives before is never looked at, which makes a collection of all the rest short.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield _collect_after
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def _collect_after(step: int) -> None:
    if step % EVERY_STEPS == 0:
        gc.collect()
