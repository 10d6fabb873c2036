"""Checks before a model is built that all ranks have the same code, config, torch, data and folder.

Ranks that differ in any of these would train to a wrong result without an error, or wait for each
other indefinitely. Digests are gathered once, and every rank comes to the same verdict.
"""

import hashlib
import importlib.util
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.errors import DataError
from data.files import sha256_of
from data.manifest import MANIFEST_FILE
from data.storage import AnyPath, StoragePath, as_path
from data.text import tokenizer_file
from trainer.check_folders import FOLDER_TIMEOUT, check_folders
from trainer.config import RunConfig
from trainer.device import DeviceInfo, available_memory
from trainer.formatting import GIB, where
from trainer.kernels import (
    AgreedKernels,
    LocalVerdicts,
    PinnedKernels,
    Platform,
    RankKernels,
    agree,
    read_pinned,
    unchecked_kernels,
)
from trainer.metrics import tensorboard_is_installed
from trainer.parallel.collectives import all_gather_objects
from trainer.parallel.grid import Grid
from trainer.planning import memory_parts, snapshot_memory
from trainer.process.errors import PreflightError, may_pass
from trainer.run_tokenizer import run_data

PACKAGES = ("data", "model", "optim", "trainer")
MISSING = "missing"
DEGREES = ("parallel.tensor", "parallel.expert", "parallel.pipeline")

CODE = f"the code ({', '.join(PACKAGES)})"
CONFIG = "the resolved config"
TORCH = "the version of torch"


@dataclass(frozen=True)
class Facts:
    """What is checked, of one rank.

    Attributes:
        digests: by what is compared, a digest or version.
        memory: bytes of the device that this process trains on.
        host_memory: bytes of its share of the host's memory.
        available: bytes of the device's memory that nothing uses now.
        kernels: what it could use.
        pinned: the kernels that the run used before, and a line if their file is damaged.
        missing: what torch.compile needs and this host lacks, if `kernels` asks for it; else empty.
    """

    rank: int
    host: str
    digests: dict[str, str]
    memory: int
    host_memory: int
    available: int
    kernels: RankKernels
    pinned: tuple[PinnedKernels | None, str]
    missing: str = ""


def preflight(
    config: RunConfig,
    grid: Grid,
    kernels: RankKernels | None = None,
    folder_timeout: float = FOLDER_TIMEOUT,
) -> tuple[list[str], AgreedKernels]:
    """Raises PreflightError, the same on all ranks, unless they can train together.

    Returns warnings, and the kernels that all ranks use.

    Every rank calls it. `kernels` are what it could use, by default without a check of its GPU.
    `folder_timeout` is in seconds: a new file in the run's folder has to be seen by all ranks
    within it.
    """
    if config.metrics.tensorboard and not tensorboard_is_installed():
        raise PreflightError(
            "metrics.tensorboard = true needs the package tensorboard, which is not installed; "
            "pip install 'v4-pretrain[tensorboard]', or set it to false"
        )
    devices = (grid.device, torch.device("cpu"))
    memory, host_memory = (DeviceInfo.of(device).memory for device in devices)
    missing = missing_compiler(grid.device) if is_compiled(config) else ""
    host, digests = socket.gethostname(), _digests(config)
    available = available_memory(grid.device)
    if kernels is None:
        kernels = RankKernels.of(config, grid.device, LocalVerdicts(Platform.of(grid.device)))
    facts = Facts(
        grid.rank,
        host,
        digests,
        memory,
        host_memory,
        available,
        kernels,
        read_pinned(config),
        missing,
    )
    everyone = all_gather_objects(facts, grid.world)
    _check_equal(everyone, config, grid)
    pinned, damage = everyone[0].pinned
    warnings = [damage] if damage else []
    warnings += _platform_warnings(everyone)
    if config.engine == "native":  # DeepSpeed shards weights and states by its own rules
        for segment in config.recipe.segments[config.segment.number :]:
            warnings += _check_memory(everyone, config.at_step(segment.first), grid.device)
    _check_compiler(everyone)
    check_folders(everyone, config, grid, folder_timeout)
    agreed = agree(
        config,
        grid.rank,
        [facts.kernels for facts in everyone],
        lambda rank: where([everyone[rank]]),
        pinned,
    )
    return warnings, agreed


def code_digest(root: Path) -> str:
    """Returns the SHA-256 of names and contents of the .py files of our packages below `root`."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _digests(config: RunConfig) -> dict[str, str]:
    path = label = run_data(config).tokenizer.path
    if isinstance(config.checkpoints, StoragePath):  # the first host alone has the run's copy
        label = config.data.tokenizer.path
    manifest = as_path(config.data.shards) / MANIFEST_FILE
    return {
        CODE: code_digest(Path(__file__).resolve().parents[1]),
        TORCH: str(torch.__version__),
        CONFIG: config.digest(),
        f"the shards in data.shards = {config.data.shards}": _file_digest(manifest),
        f"the tokenizer at data.tokenizer.path = {label}": _tokenizer(path),
    }


def _file_digest(path: AnyPath) -> str:
    """Returns a file's digest; that it is missing on all ranks is reported where it is read."""
    try:
        return sha256_of(path)
    except OSError as error:
        if may_pass(error):
            raise
        return MISSING


def _tokenizer(path: str) -> str:
    try:
        return _file_digest(tokenizer_file(path))
    except DataError:
        return MISSING


def _check_equal(everyone: list[Facts], config: RunConfig, grid: Grid) -> None:
    """Raises for the first difference; the config comes before the files that it names."""
    for what in everyone[0].digests:
        values = [facts.digests.get(what, MISSING) for facts in everyone]
        others = [f for f, value in zip(everyone, values, strict=True) if value != values[0]]
        if not others:
            continue
        if what == CONFIG:
            configs = all_gather_objects(config.to_dict(), grid.world)
            difference = _difference(configs[0], configs[others[0].rank])
            what = f"{CONFIG}: {difference}"
        else:
            first, second = values[0], others[0].digests.get(what, MISSING)
            what = f"{what}: {first[:16]} and {second[:16]}"
        raise PreflightError(
            f"{where([everyone[0]])} and {where(others)} differ in {what}; "
            "every host should see the same"
        )


def _platform_warnings(everyone: list[Facts]) -> list[str]:
    """Returns a line for other GPUs, drivers or versions of Triton than the first rank has."""
    first, warnings = everyone[0], []
    for what, field in (("GPUs", "kind"), ("drivers", "driver"), ("versions of Triton", "triton")):
        value = getattr(first.kernels.platform, field)
        others = [one for one in everyone if getattr(one.kernels.platform, field) != value]
        if others:
            other = getattr(others[0].kernels.platform, field)
            warnings.append(
                f"{where([first])} and {where(others)} have different {what}: {value} and {other}"
            )
    return warnings


def _difference(one: Mapping[str, Any], other: Mapping[str, Any], above: str = "") -> str:
    """Returns `steps is 5 and 6` for the first key in which two configs differ."""
    for name, value in one.items():
        second = other.get(name)
        if value == second:
            continue
        if isinstance(value, Mapping) and isinstance(second, Mapping):
            return _difference(value, second, f"{above}{name}.")
        return f"{above}{name} is {value!r} and {second!r}"
    return "a key that one of them does not have"


def _check_memory(everyone: list[Facts], config: RunConfig, device: torch.device) -> list[str]:
    """Raises if what a process holds throughout a segment does not fit into its memory.

    Returns a warning if it does not fit into what is available now.
    """
    degrees = config.degrees(len(everyone))
    needed = sum(memory_parts(config, degrees).values())
    snapshots = snapshot_memory(config, degrees, page_locked=device.type == "cuda")
    what = "weights, gradients and optimizer states"
    if len(config.recipe.segments) > 1:
        what += f" at the degrees of phase {config.segment.phases[0].number}"
    if device.type == "cpu":
        needed += snapshots
        what += ", with the snapshots of stability.spikes," if snapshots else ""
    _check_room(everyone, [facts.memory for facts in everyone], needed, what)
    fullest = min(everyone, key=lambda facts: facts.available)
    warnings = []
    if fullest.available < needed:
        warnings.append(
            f"{what} take {needed / GIB:,.2f} GiB on a process, while {where([fullest])} has "
            f"{fullest.available / GIB:,.2f} GiB available now: other programs use the rest, and "
            "the run may fail or be killed"
        )
    what = "the snapshots of stability.spikes, which are on the host,"
    _check_room(everyone, [facts.host_memory for facts in everyone], snapshots, what)
    return warnings


def _check_room(everyone: list[Facts], memory: list[int], needed: int, what: str) -> None:
    smallest, facts = min(zip(memory, everyone, strict=True), key=lambda pair: pair[0])
    if smallest >= needed:
        return
    raise PreflightError(
        f"{what} take {needed / GIB:,.2f} GiB on a process, while {where([facts])} has "
        f"{smallest / GIB:,.2f} GiB; spread the model with a higher {', '.join(DEGREES[:-1])} or "
        f"{DEGREES[-1]}, or use a smaller model"
    )


def is_compiled(config: RunConfig) -> bool:
    """Whether the config has operations through torch.compile."""
    choices = unchecked_kernels(config).by_operation().values()
    return any(choice.name == "compile" for choice in choices)


def missing_compiler(device: torch.device) -> str:
    """Returns what torch.compile needs for `device` and this host lacks; empty if nothing."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "triton for a GPU"
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes long to import
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler (g++, or what CXX names)"
    return ""


def _check_compiler(everyone: list[Facts]) -> None:
    without = [facts for facts in everyone if facts.missing]
    if without:
        raise PreflightError(
            f"kernels = compile needs {without[0].missing}, and there is none for "
            f"{where(without)}; install it, or set kernels to auto or eager"
        )
