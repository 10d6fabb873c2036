"""Whether checkpoints are written beside training: what the config wants and the hosts can hold.

All ranks come to the same answer before anything is built.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

import torch

from trainer.config import RunConfig
from trainer.device import available_memory
from trainer.formatting import gib
from trainer.parallel.collectives import all_gather_objects
from trainer.parallel.grid import Grid
from trainer.planning import (
    checkpoint_copy_memory,
    memory_parts,
    rough_activations,
    snapshot_memory,
)
from trainer.process.errors import PreflightError


@dataclass(frozen=True)
class SaveMode:
    """How a run saves, and a line about it for the log; empty where the config says it all."""

    is_async: bool
    message: str


def choose_save_mode(config: RunConfig, grid: Grid) -> SaveMode:
    """Returns how the run saves; every rank calls it.

    Raises PreflightError, the same on all ranks, where the config demands `async` and a host has
    not the memory.
    """
    if not config.may_save_async:
        return SaveMode(False, "")
    degrees = config.degrees(grid.world_size)
    copy = checkpoint_copy_memory(config, degrees)
    if not copy:
        return SaveMode(True, "")  # only the last checkpoint is saved, for which steps stop
    on_cpu = grid.device.type == "cpu"
    needed = copy + snapshot_memory(config, degrees, page_locked=not on_cpu)
    if on_cpu:
        needed += sum(memory_parts(config, degrees).values())
    if on_cpu or config.parallel.offload:
        needed += rough_activations(config)
    own = available_memory(torch.device("cpu")), socket.gethostname(), grid.rank
    available, host, rank = min(all_gather_objects(own, grid.world))
    if needed <= available:
        return SaveMode(
            True,
            "checkpoints are written beside training, for which a process takes at most "
            f"{gib(copy)} of its host's memory",
        )
    lack = (
        f"the copy that is written beside training takes up to {gib(copy)} of host memory on a "
        f"process, with the rest of the run {gib(needed)}, while rank {rank} on {host} has "
        f"{gib(available)} available"
    )
    if config.checkpoint.mode == "async":
        raise PreflightError(
            f"checkpoint.mode = async: {lack}; set checkpoint.mode=sync, or spread the model over "
            "more hosts"
        )
    return SaveMode(False, f"steps stop while a checkpoint is written: {lack}")
