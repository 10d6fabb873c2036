"""The device that this process computes on, by the config's `device`, or why it cannot have it.

A GPU that torch cannot use is an error, never a reason to train on the CPU: that would take weeks
where days were planned, and nothing but the speed would show it.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from trainer.process.errors import PreflightError

DeviceSetting = Literal["auto", "cuda", "cpu"]
DRIVER_OF_CUDA = {12: 525, 13: 580}
"""Oldest driver for builds of torch, by the first number of their CUDA version (NVIDIA's table of
minor version compatibility)."""
_LIST_SECONDS = 30.0
"""Limit of nvidia-smi, which takes seconds on a host with many GPUs."""
TO_CPU = "set device=cpu to compute on the CPU"
TO_CUDA_12 = "a torch built for CUDA 12 (--index-url https://download.pytorch.org/whl/cu126)"


def local_device(setting: DeviceSetting) -> torch.device:
    """Returns the GPU numbered LOCAL_RANK, or the CPU: with `auto` where the host has no GPU.

    Raises PreflightError where there is a GPU that torch cannot use, unless CUDA_VISIBLE_DEVICES
    hides it, or for whose architecture torch was not built, and where this host runs more processes
    than it has GPUs.
    """
    if setting == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        _check_count()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        _check_architecture(device)
        return device
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    driver = None if hidden else Driver.of_host()
    if driver is not None:
        raise PreflightError(driver.problem())
    if setting == "cuda":
        raise PreflightError(
            f"device = cuda, and CUDA_VISIBLE_DEVICES hides every GPU; unset it, or {TO_CPU}"
            if hidden
            else f"device = cuda, and this host has no GPU; {TO_CPU}"
        )
    return torch.device("cpu")


def usable_gpus(setting: DeviceSetting) -> int:
    """Returns how many processes of this host can have a GPU, 0 on the CPU; raises as above."""
    return torch.cuda.device_count() if local_device(setting).type == "cuda" else 0


def _check_count() -> None:
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes <= gpus:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    allowed = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    raise PreflightError(
        f"{processes} processes on this host, and torch finds {gpus} GPU{'s' * (gpus > 1)}"
        f"{allowed}: every process needs one; use --nproc-per-node {gpus}, or {TO_CPU}"
    )


def _check_architecture(device: torch.device) -> None:
    """Checks that torch has machine code for this GPU, or code that the driver can compile for it.

    Machine code, sm_XY, runs on GPUs of the same first number and the same or a higher second one,
    and PTX, compute_XY, on all later ones.
    """
    if torch.version.cuda is None:  # ROCm's architectures have other names
        return
    own = torch.cuda.get_device_capability(device)
    names = torch.cuda.get_arch_list()
    matches = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name) for name in names]
    for match in filter(None, matches):
        built = int(match[2]), int(match[3])
        is_family = built[0] == own[0] and built[1] <= own[1]
        is_portable = match[1] == "compute" and not match[4] and built <= own
        if is_portable or (is_family and match[4] != "a") or built == own:
            return
    capability = "{}.{}".format(*own)
    remedy = f"{TO_CUDA_12}, or " if own < (7, 5) else ""
    raise PreflightError(
        f"{torch.cuda.get_device_name(device)} has compute capability {capability}, and torch "
        f"{torch.__version__} is built for {', '.join(names) or 'no GPU'}; install "
        f"{remedy}a build that has sm_{own[0]}{own[1]}, or {TO_CPU}"
    )


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver on this host.

    Attributes:
        evidence: what shows that there is a GPU.
        version: such as 535.104.05; None if unknown.
        cuda: newest CUDA version that it supports, (12, 2) for 12.2; None if unknown.
    """

    evidence: str
    version: str | None
    cuda: tuple[int, int] | None

    @classmethod
    def of_host(cls) -> Driver | None:
        """Returns the driver; None where nothing shows a GPU."""
        evidence = _evidence_of_gpu(Path("/"))
        return None if evidence is None else cls(evidence, driver_version(), _driver_cuda())

    def problem(self) -> str:
        """Returns a sentence: why torch cannot use the GPU, and what to install."""
        details = [f"driver {self.version}"] if self.version else []
        if self.cuda:
            details.append("CUDA {}.{} or older".format(*self.cuda))
        driver = f", {', '.join(details)}" if details else ""
        start = f"this host has an NVIDIA GPU ({self.evidence}{driver}), and torch"
        start += f" {torch.__version__} cannot use it: "
        if torch.version.cuda is None:
            return f"{start}it is built without CUDA; install a build with CUDA, or {TO_CPU}"
        built = int(torch.version.cuda.split(".")[0])
        if self.cuda is None or self.cuda[0] >= built:
            return f"{start}{_torchs_reason()}; `nvidia-smi` shows the driver's state; or {TO_CPU}"
        needed = DRIVER_OF_CUDA.get(built)
        remedies = [f"install driver {needed} or newer" if needed else "install a newer driver"]
        remedies += [TO_CUDA_12] if self.cuda[0] == 12 else []
        remedy = ", or ".join([*remedies, TO_CPU])
        return f"{start}it is built for CUDA {torch.version.cuda}; {remedy}"


def _evidence_of_gpu(root: Path) -> str | None:
    """Returns what shows that there is an NVIDIA GPU: a file of the driver, or nvidia-smi.

    nvidia-smi has to list one: it is installed on hosts without a GPU as well, where all images or
    nodes of a cluster are alike. In WSL, /dev/dxg may be any vendor's GPU.
    """
    files = [*root.glob("dev/nvidia[0-9]*"), *root.glob("proc/driver/nvidia/gpus/*")]
    if files:
        return str(min(files))
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    if (root / "dev/dxg").exists():
        return program
    try:
        listed = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=_LIST_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return program if listed.stdout.startswith("GPU ") else None


def driver_version() -> str | None:
    """Returns the version of NVIDIA's driver, such as 535.104.05; None without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", text)
    return match[1] if match else None


def _driver_cuda() -> tuple[int, int] | None:
    """Asks the driver's library, which answers also where no device can be opened."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _torchs_reason() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return "it finds no device"
