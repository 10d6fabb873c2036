"""The GPU and the software of a process, as far as they decide which kernels pass."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from model.kernels.operations import LIBRARIES

if TYPE_CHECKING:
    import torch

NONE = "none"


@dataclass(frozen=True)
class Platform:
    """A kind of GPU, or the CPU, and what runs on it.

    Attributes:
        name: as the driver has it, or "cpu".
        capability: such as "9.0"; "" on a CPU.
        processors: streaming multiprocessors; 0 on a CPU.
        driver, torch_version, cuda, triton: versions, "none" where there is none.
        libraries: names and versions of the optional packages with kernels, "" on a CPU.
    """

    name: str
    capability: str = ""
    processors: int = 0
    driver: str = NONE
    torch_version: str = NONE
    cuda: str = NONE
    triton: str = NONE
    libraries: str = ""

    @classmethod
    def of(cls, device: torch.device) -> Platform:
        """Describes a device of this process."""
        import torch

        from trainer.process.local_device import driver_version

        torch_version, triton = str(torch.__version__), _version("triton")
        if device.type != "cuda":
            return cls(device.type, torch_version=torch_version, triton=triton)
        properties = torch.cuda.get_device_properties(device)
        return cls(
            properties.name,
            f"{properties.major}.{properties.minor}",
            properties.multi_processor_count,
            driver_version() or NONE,
            torch_version,
            torch.version.cuda or torch.version.hip or NONE,
            triton,
            ", ".join(installed_libraries()),
        )

    @property
    def kind(self) -> str:
        """Names the kind of GPU, whatever runs on it."""
        if not self.capability:
            return self.name
        return f"{self.name} ({self.capability}, {self.processors} SMs)"

    @property
    def label(self) -> str:
        """Names what kernels depend on within a job: the GPU, its driver, Triton and libraries."""
        if not self.capability:
            return self.name
        libraries = f", {self.libraries}" if self.libraries else ""
        return f"{self.kind}, driver {self.driver}, triton {self.triton}{libraries}"


def installed_libraries() -> list[str]:
    """Returns name and version of each optional package that can be imported; imports none."""
    names = [name for name in LIBRARIES if importlib.util.find_spec(name) is not None]
    return [f"{name} {_version(LIBRARIES[name])}" for name in names]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return NONE
