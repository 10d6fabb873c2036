"""A check of a lease that this process, or the process that started it, holds."""

import errno
import time
from collections.abc import Iterable
from dataclasses import dataclass

from data.lease import RENEW_SECONDS, Owner, taken_over
from data.storage import as_path

MISSING_SECONDS = 2.5 * RENEW_SECONDS
"""Until a file that was removed by hand, or moved with its folder, is there again."""
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class HeldLease:
    """A lease by the place of its file and the token of its owner.

    A process that was stopped for longer than its lease lasts reads the file itself before it
    publishes or removes anything: the thread that renews the lease may not have run yet.
    """

    path: str
    token: str

    def require(self) -> None:
        """Raises LeaseError where another process has taken the lease over.

        Raises OSError where its file is missing and is not written within `MISSING_SECONDS`.
        """
        path, deadline = as_path(self.path), time.monotonic() + MISSING_SECONDS
        while (owner := _owner(self.path)) is None:
            if time.monotonic() > deadline:
                raise FileNotFoundError(errno.ENOENT, f"{path.name} has been removed", self.path)
            time.sleep(_POLL_SECONDS)
        if owner.token != self.token:
            raise taken_over(path, owner)


def require_leases(leases: Iterable[HeldLease]) -> None:
    """Raises as `HeldLease.require` where one of them is not held any more."""
    for lease in leases:
        lease.require()


def _owner(path: str) -> Owner | None:
    """Returns the owner in a lease file; None without a file, or for one that is being written."""
    try:
        return Owner.parse(as_path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
