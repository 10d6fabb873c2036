"""Which kernels a process would use: the config's setting, and what passed on its GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING

from model.kernels.operations import BLOCKS_OF_TRITON, LIBRARIES, Choice, Kernels
from trainer.config import RunConfig
from trainer.kernels.verdict import Verdict
from trainer.process.errors import PreflightError

if TYPE_CHECKING:
    import torch


def run_operations(config: RunConfig) -> tuple[str, ...]:
    """Returns the operations of this run, in the order of model.kernels.operations.OPERATIONS."""
    from model.kernel_choices import operations_of

    operations = operations_of(config.model, config.precision == "fp8")
    if config.segment.parallel.tensor > 1:  # the loss of a sharded vocabulary is megatron-core's
        operations = tuple(name for name in operations if name != "cross_entropy")
    return (*operations, "syrk") if config.engine == "native" else operations


def settings_without_effect(config: RunConfig) -> list[str]:
    """Returns a line for each kernel that the config names for an operation not of this run."""
    if isinstance(config.kernels, str):
        return []
    reasons = {
        "cross_entropy": "parallel.tensor > 1 takes megatron-core's loss",
        "fp8": f"precision is {config.precision}",
        "grouped_mm": f"precision is {config.precision}",
        "syrk": f"engine is {config.engine}",
    }
    operations = run_operations(config)
    return [
        f"kernels.{name} = {setting} has no effect: this run does not have the operation, as "
        f"{reasons.get(name, 'no layer of the model has it')}"
        for name, setting in config.kernels.items()
        if setting not in ("auto", "eager") and name not in operations
    ]


def unchecked_kernels(config: RunConfig) -> Kernels:
    """Returns the implementations that the config names; eager where it has "auto"."""
    named = {name: config.kernel_setting(name) for name in run_operations(config)}
    return Kernels(**{name: Choice(what) for name, what in named.items() if what != "auto"})


def choose_kernels(
    config: RunConfig, device: torch.device, verdicts: Mapping[str, Verdict]
) -> Kernels:
    """Returns what this process would use on `device`.

    "auto" takes what was fastest of all that passed; on a CPU, and for operations without a
    verdict, the eager version.

    Raises PreflightError if the config demands a kernel that cannot run or did not pass.
    """
    unsupported = unsupported_operations(config, device)
    choices = {}
    for operation in run_operations(config):
        setting, verdict = config.kernel_setting(operation), verdicts.get(operation)
        problem = unsupported.get(operation)
        if setting == "auto":
            choices[operation] = _automatic(device, problem, verdict)
            continue
        if setting in ("eager", "compile"):
            choices[operation] = Choice(setting, why="as configured")
            continue
        problem = _refusal(setting, device, verdict) or problem
        if problem is not None:
            raise PreflightError(_demand(config, operation, setting, problem))
        choices[operation] = Choice(setting, _blocks(setting, verdict), "as configured")
    return Kernels(**choices)


def unsupported_operations(config: RunConfig, device: torch.device) -> dict[str, str]:
    """Returns the reason for each operation of the run that Triton cannot run on `device`."""
    import torch

    from model.kernel_choices import unsupported_by_triton
    from optim.muon import newton_schulz_dtype

    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    operations = run_operations(config)
    on_model = [name for name in operations if name != "syrk"]
    reasons = unsupported_by_triton(config.model, device, dtype, on_model)
    if "syrk" in operations:
        dtype = newton_schulz_dtype(config.optim.muon, device)
        reasons |= unsupported_by_triton(config.model, device, dtype, ["syrk"])
    return reasons


def _automatic(device: torch.device, problem: str | None, verdict: Verdict | None) -> Choice:
    if device.type != "cuda":
        return Choice(why=f"on {device.type}")
    if problem is not None:
        return Choice(why=problem)
    if verdict is None:
        return Choice(why="its kernel was not checked on this GPU")
    return Choice(verdict.choice, _blocks(verdict.choice, verdict), verdict.why)


def _refusal(name: str, device: torch.device, verdict: Verdict | None) -> str | None:
    """Returns why Triton or a library cannot be used, as far as is known."""
    if name in LIBRARIES:
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
        if device.type != "cuda":
            return f"{name} runs on a GPU, not on {device.type}"
    return None if verdict is None else verdict.refusal(name)


def _blocks(name: str, verdict: Verdict | None) -> Mapping[str, int]:
    return verdict.blocks if verdict is not None and name in BLOCKS_OF_TRITON else {}


def _demand(config: RunConfig, operation: str, setting: str, problem: str) -> str:
    """Returns the sentence about a kernel that is demanded and cannot run."""
    where = "kernels" if isinstance(config.kernels, str) else f"kernels.{operation}"
    what = f": {operation}: " if where == "kernels" else ": "
    return f"{where} = {setting}{what}{problem}; set kernels.{operation} to auto or eager"
