"""A GPU that can only be compiled for: its target, its limits, and no device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from trainer.kernels.fit import DeviceLimits

LIMITS = {
    80: DeviceLimits(80, 166_912),
    89: DeviceLimits(89, 101_376),
    90: DeviceLimits(90, 232_448),
    100: DeviceLimits(100, 232_448),
    120: DeviceLimits(120, 101_376),
}
"""By compute capability; shared memory per program as CUDA's programming guide has it."""


class TargetDriver:
    """What Triton asks its driver before a launch, for tensors on the CPU."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        """A number of its own for each target: Triton keeps what it compiled by device."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def target(capability: int) -> Iterator[DeviceLimits]:
    """Compiles for this GPU; a kernel that would be launched fails."""
    from triton.runtime import driver

    before = driver._active
    driver.set_active(TargetDriver(capability))  # type: ignore[arg-type]
    try:
        yield LIMITS[capability]
    finally:
        driver._active = before
