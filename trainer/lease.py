"""The lease on a folder that several ranks write into together."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data.lease import LEASE_FILE, Lease
from trainer.failures import FailureWatch
from trainer.parallel.grid import Grid


@contextmanager
def lease_on(
    folder: Path, work: str, grid: Grid, watch: FailureWatch, name: str = LEASE_FILE
) -> Iterator[Callable[[], None]]:
    """Holds the lease in the first rank, for all ranks; yields its `check`, to call before writing.

    Raises LeaseError on the first rank, which ends the others through `watch`.
    """
    if not grid.is_first:
        yield lambda: None
        return
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    launch = "" if launch == "none" else launch  # torchrun's default, which names no job
    with Lease(folder, work, launch, name) as lease:
        watch.at_end.append(lease.release)
        yield lease.check
