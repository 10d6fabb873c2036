"""Processes killed at random moments of their work, however fast it goes."""

import random
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill_after(
    process: BaseProcess,
    folder: Path,
    pattern: str,
    count: int,
    rng: random.Random,
    within: float = 0.1,
) -> None:
    """SIGKILL within `within` seconds after `folder` holds `count` files of `pattern`."""
    until(lambda: len(list(folder.glob(pattern))) >= count or not process.is_alive())
    time.sleep(rng.uniform(0.0, within))
    process.kill()
    process.join()
