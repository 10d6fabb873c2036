"""What a process of a run should hold, told before the run begins.

It is the dry run's count (trainer/planning/dry_run.py) of this process alone; trainer/device.py reports
the peak.
"""

from __future__ import annotations

import os

from trainer.config import RunConfig
from trainer.config.recipe import Recipe
from trainer.formatting import gib
from trainer.parallel.collectives import gather_objects
from trainer.parallel.grid import Grid
from trainer.planning.dry_run import RankMemory, rank_memory


def expected(config: RunConfig) -> RankMemory | None:
    """What this process will hold; None where the engine is not the native one.

    Called before there is a process group. Raises ConfigError as `RunConfig.degrees`.
    """
    if config.engine != "native":
        return None
    degrees = config.degrees(int(os.environ.get("WORLD_SIZE", "1")))
    return rank_memory(config, degrees, int(os.environ.get("RANK", "0")))


def expected_words(config: RunConfig, grid: Grid, mine: RankMemory | None) -> str:
    """A line about the process that will hold most; every rank calls it."""
    everyone = [found for found in gather_objects(mine, grid.world) if found is not None]
    if not everyone:
        return f"memory: with engine = {config.engine} there is no estimate before the run"
    full = max(everyone, key=lambda found: found.total)
    rows = Recipe(config).largest.rows
    lasting = ", ".join(f"{name} {gib(size)}" for name, size in full.resident.items())
    again = f"parallel.recompute = [{', '.join(config.parallel.recompute)}]"
    if config.parallel.offload:
        again += f" and parallel.offload = [{', '.join(config.parallel.offload)}]"
    return (
        f"memory: about {gib(full.total)} at most expected on a process (the fullest is rank "
        f"{full.rank}): {lasting}; in forward and backward of {rows.micro_batch_size} x "
        f"{rows.seq_len:,} tokens with {again}: rows "
        f"{gib(full.microbatches)}, activations {gib(full.activations)}, workspace "
        f"{gib(full.workspace)}; or in the update {gib(full.update)}"
    )
