"""The kernels that a run has used, in `kernels.json` of its folder. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from data.files import write_atomically
from model.kernels.operations import IMPLEMENTATIONS, Choice, Kernels
from trainer.config import RunConfig
from trainer.kernels.choose import unchecked_kernels
from trainer.kernels.gpu import Platform

if TYPE_CHECKING:
    import torch

KERNELS_FILE = "kernels.json"


class OfKind(BaseModel):
    """The kernels on one kind of device.

    Attributes:
        key: digest of the verdicts that they were chosen by; "" where none were needed.
        choices: name and block sizes by operation.
        failed: operations whose Triton kernel had not passed; a resume uses it once it has.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    choices: dict[str, Choice]
    failed: tuple[str, ...] = ()

    def kernels(self) -> Kernels:
        """Returns the choices. Raises ValueError for an implementation that there is not."""
        return Kernels(**self.choices)


class PinnedKernels(BaseModel):
    """The contents of the file.

    Attributes:
        setting: `kernels` of the config.
        kinds: by `Platform.label` of a device.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    setting: str | dict[str, str]
    kinds: dict[str, OfKind]

    def write(self, run_dir: Path) -> None:
        """Writes the file into a run's folder, whole."""
        write_atomically(run_dir / KERNELS_FILE, self.model_dump_json(indent=1) + "\n")

    def choices_of(self, operation: str) -> set[tuple[str, tuple[tuple[str, int], ...]]]:
        """Returns the names and block sizes that an operation has on all kinds of device."""
        return {
            (choice.name, tuple(sorted(choice.blocks.items())))
            for kind in self.kinds.values()
            for name, choice in kind.choices.items()
            if name == operation
        }


def read_pinned(config: RunConfig) -> tuple[PinnedKernels | None, str]:
    """Returns what the file has, None for a new run, and a line about a damaged file."""
    path = config.run_dir / KERNELS_FILE
    try:
        pinned = PinnedKernels.model_validate_json(path.read_bytes())
        for kind in pinned.kinds.values():
            kind.kernels()
    except FileNotFoundError:
        return _before_this_file(config), ""
    except (ValidationError, ValueError, TypeError, OSError):
        return None, f"{path} is damaged: kernels are chosen again, as for a new run"
    return pinned, ""


def _before_this_file(config: RunConfig) -> PinnedKernels | None:
    """Returns what a run of a version without this file used: no Triton. None for a new run.

    What such a run compiled is not known.
    """
    if not config.has_begun:
        return None
    eager = {name: Choice() for name, names in IMPLEMENTATIONS.items() if "compile" not in names}
    return PinnedKernels(setting="", kinds={"": OfKind(key="", choices=eager)})


def pin(
    setting: str | dict[str, str],
    kinds: Mapping[str, tuple[str, Mapping[str, Choice], Iterable[str]]],
) -> PinnedKernels:
    """Returns what to write; `kinds` has digest, choices and failed operations of each kind."""
    values: dict[str, Any] = {
        name: {
            "key": key,
            "choices": {operation: asdict(choice) for operation, choice in choices.items()},
            "failed": tuple(failed),
        }
        for name, (key, choices, failed) in kinds.items()
    }
    return PinnedKernels.model_validate({"setting": setting, "kinds": values})


def kernels_without_check(config: RunConfig, device: torch.device) -> Kernels:
    """Returns the kernels of a process that checks no device, such as that of `v4 generate`.

    They are those that the config names: Triton's and libraries' only where the run has used them
    on such a device, with its block sizes; eager otherwise, and for "auto".
    """
    pinned, _ = read_pinned(config)
    kind = None if pinned is None else pinned.kinds.get(Platform.of(device).label)
    choices = unchecked_kernels(config).by_operation()
    for operation, choice in choices.items():
        if choice.name not in ("eager", "compile"):
            used = Choice() if kind is None else kind.choices.get(operation, Choice())
            choices[operation] = used if used.name == choice.name else Choice()
    return Kernels(**choices)
