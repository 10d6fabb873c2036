"""The leases on the folders that several ranks write into together."""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from data.held_lease import HeldLease
from data.lease import LEASE_FILE, Lease, LeaseStopped
from data.storage import AnyPath
from trainer.parallel.grid import Grid
from trainer.process.failures import FailureWatch
from trainer.process.signals import StopRequest


@dataclass(frozen=True)
class RunLeases:
    """The leases of a run, on the first rank; other ranks have none."""

    leases: tuple[Lease, ...] = ()

    def check(self) -> None:
        """Raises LeaseError if another process has taken one over; to be called before writing."""
        for lease in self.leases:
            lease.check()

    @property
    def held(self) -> tuple[HeldLease, ...]:
        """The leases as a process that publishes for the run checks them."""
        return tuple(HeldLease(str(one.path), one.owner.token) for one in self.leases)


@contextmanager
def leases_on(
    folders: Iterable[AnyPath], work: str, grid: Grid, watch: FailureWatch, stop: StopRequest
) -> Iterator[RunLeases]:
    """Holds the leases on several folders as `lease_on`, and yields them."""
    with ExitStack() as stack:
        contexts = [lease_on(one, work, grid, watch, stop=stop) for one in folders]
        leases = [stack.enter_context(context) for context in contexts]
        yield RunLeases(tuple(lease for lease in leases if lease is not None))


@contextmanager
def lease_on(
    folder: AnyPath,
    work: str,
    grid: Grid,
    watch: FailureWatch,
    name: str = LEASE_FILE,
    stop: StopRequest | None = None,
) -> Iterator[Lease | None]:
    """Holds the lease in the first rank, for all ranks; yields it there, None on other ranks.

    Raises LeaseError on the first rank, which ends the others through `watch`. Where `stop` is
    requested while the lease is waited for, nobody holds it: the caller ends before it writes.
    """
    if not grid.is_first:
        yield None
        return
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    launch = "" if launch == "none" else launch  # torchrun's default, which names no job
    stop = stop or StopRequest()
    with ExitStack() as stack:
        lease = Lease(folder, work, launch, name, is_stopped=lambda: stop.requested)
        with suppress(LeaseStopped):
            stack.enter_context(lease)
            watch.at_end.append(lease.release)
        yield lease
