"""The lease on a folder that several ranks write into together."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from data.lease import LEASE_FILE, Lease, LeaseStopped
from data.storage import AnyPath
from trainer.parallel.grid import Grid
from trainer.process.failures import FailureWatch
from trainer.process.signals import StopRequest


@contextmanager
def leases_on(
    folders: Iterable[AnyPath], work: str, grid: Grid, watch: FailureWatch, stop: StopRequest
) -> Iterator[Callable[[], None]]:
    """Holds the leases on several folders as `lease_on`; yields a check of all of them."""
    with ExitStack() as stack:
        checks = [
            stack.enter_context(lease_on(one, work, grid, watch, stop=stop)) for one in folders
        ]

        def check() -> None:
            for one in checks:
                one()

        yield check


@contextmanager
def lease_on(
    folder: AnyPath,
    work: str,
    grid: Grid,
    watch: FailureWatch,
    name: str = LEASE_FILE,
    stop: StopRequest | None = None,
) -> Iterator[Callable[[], None]]:
    """Holds the lease in the first rank, for all ranks; yields its `check`, to call before writing.

    Raises LeaseError on the first rank, which ends the others through `watch`. Where `stop` is
    requested while the lease is waited for, nobody holds it: the caller ends before it writes.
    """
    if not grid.is_first:
        yield lambda: None
        return
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    launch = "" if launch == "none" else launch  # torchrun's default, which names no job
    stop = stop or StopRequest()
    with ExitStack() as stack:
        lease = Lease(folder, work, launch, name, is_stopped=lambda: stop.requested)
        with suppress(LeaseStopped):
            stack.enter_context(lease)
            watch.at_end.append(lease.release)
        yield lease.check
