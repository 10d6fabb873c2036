"""The device that a process finds: its name, its memory, and its peak."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil
import torch

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
"""Dense products in bf16 by the makers' data sheets, TFLOP/s; the first name that fits counts."""


@dataclass(frozen=True)
class Card:
    """A GPU, or this process's share of the machine."""

    name: str
    memory: int
    """In bytes."""

    @classmethod
    def of(cls, device: torch.device) -> Card:
        """The one that a process on `device` trains on."""
        if device.type == "cuda":
            found = torch.cuda.get_device_properties(device)
            return cls(found.name, found.total_memory)
        share = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls("CPU", psutil.virtual_memory().total // share)

    @property
    def peak_tflops(self) -> float | None:
        """In bf16; None where it is not known."""
        return next((peak for name, peak in PEAK_TFLOPS.items() if name in self.name), None)
