"""The most memory that the processes of a run have held.

On a GPU that is the peak of torch's allocator. A CPU has no such count: there it is the process's
peak resident memory, in which Python and the libraries are, too.
"""

from __future__ import annotations

import resource

import torch

from trainer.formatting import gib
from trainer.parallel.collectives import gather_objects
from trainer.parallel.grid import Grid


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held since it began; see above."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def peak_words(grid: Grid) -> str:
    """A line about the process that has held most; every rank calls it."""
    everyone = gather_objects(peak_bytes(grid.device), grid.world)
    most = max(everyone)
    what = "resident, Python and libraries included"
    if grid.device.type == "cuda":
        what = "allocated on its GPU"
    return f"memory: {gib(most)} at most so far on a process (rank {everyone.index(most)}), {what}"
