"""The device that a process trains on: name, memory, peak FLOP/s; and the memory a run has used."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass

import torch

from trainer.formatting import gib
from trainer.parallel.collectives import all_gather_objects
from trainer.parallel.grid import Grid
from trainer.process.host_memory import HostMemory

PEAK_TFLOPS = {
    "A100": 312,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200 NVL": 835,
    "H200": 989,
    "H800": 989,
    "B200": 2250,
}
"""Dense bf16 matmuls by the makers' data sheets, TFLOP/s; the first name that matches counts."""


@dataclass(frozen=True)
class DeviceInfo:
    """A GPU, or this process's share of the host."""

    name: str
    memory: int
    """In bytes."""

    @classmethod
    def of(cls, device: torch.device) -> DeviceInfo:
        """Describes `device`; the host's memory is divided among its processes."""
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            return cls(properties.name, properties.total_memory)
        return cls("CPU", HostMemory.read().total // processes_of_host())

    @property
    def peak_tflops(self) -> float | None:
        """Dense bf16 TFLOP/s; None for an unknown device."""
        return next((peak for name, peak in PEAK_TFLOPS.items() if name in self.name), None)


def available_memory(device: torch.device) -> int:
    """Returns the bytes of a GPU that are free now, or this process's share of the host's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return HostMemory.read().available // processes_of_host()


def processes_of_host() -> int:
    """Returns the number of this run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory of this process so far, in bytes.

    On a GPU it is the peak of torch's allocator. A CPU has no such count: there it is the process's
    peak resident memory, Python and the libraries included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def peak_memory_report(grid: Grid) -> str:
    """Returns a line about the process with the highest peak; every rank calls it."""
    peaks = all_gather_objects(peak_memory(grid.device), grid.world)
    peak = max(peaks)
    kind = "resident, Python and libraries included"
    if grid.device.type == "cuda":
        kind = "allocated on its GPU"
    return f"memory: peak {gib(peak)} so far on a process (rank {peaks.index(peak)}), {kind}"
