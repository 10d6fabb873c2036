"""Advice when a device is out of memory: the settings that save most, with their memory.

The estimates are those of `v4 plan --dry-run`, in a separate process: the one that failed may be
part of a process group, and its device is full.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.config import ConfigError, RunConfig, load_config
from trainer.formatting import gib
from trainer.parallel.grid import Grid
from trainer.process.errors import OutOfMemoryError, failed_allocation

MAX_SUGGESTIONS = 3
"""Settings that the advice names."""
ESTIMATE_TIMEOUT_SECONDS = 900


@contextmanager
def advise_on_out_of_memory(config: RunConfig, grid: Grid) -> Iterator[None]:
    """Turns a failed allocation, on a GPU or the host, into a sentence with advice.

    Raises OutOfMemoryError.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (allocation := failed_allocation(error)) is None:
            raise
        raise OutOfMemoryError(
            f"{grid.device}: {allocation}; {advice(config, grid.world_size)}"
        ) from None


def advice(config: RunConfig, world: int) -> str:
    """Returns a sentence about the settings that save most, from a separate process."""
    if config.engine != "native":
        return "try a smaller data.micro_batch_size or data.seq_len"
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_", "LOCAL_"))
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(config.to_yaml())
        command = [sys.executable, "-m", "trainer.planning.out_of_memory", str(path), str(world)]
        command.append(str(config.segment.first))
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=ESTIMATE_TIMEOUT_SECONDS,
                check=True,
            )
        except subprocess.SubprocessError:
            return "v4 plan --dry-run shows the memory of a config"
    return done.stdout.strip()


def candidates(config: RunConfig) -> list[str]:
    """Returns settings that need less memory.

    All give the same training, except the last one: shorter rows.
    """
    data, parallel, number = config.data, config.segment.parallel, config.segment.largest.number
    recompute, section = set(parallel.recompute), "parallel"
    if config.phases and (own := config.phases[number].parallel) and own.recompute is not None:
        section = f"phases.{number}.parallel"
    settings, rows, key = [], data.micro_batch_size, "data.micro_batch_size"
    if config.phases and (rows_of_phase := config.phases[number].micro_batch_size) is not None:
        rows, key = rows_of_phase, f"phases.{number}.micro_batch_size"
    if rows > 1:
        settings.append(f"{key}={rows // 2}")
    for parts in (["norms", "streams"], ["attention", "norms", "streams"], ["block"]):
        if "block" not in recompute and not set(parts) <= recompute:
            settings.append(f"{section}.recompute=[{','.join(parts)}]")
    if "block" in recompute and "block" not in parallel.offload:
        settings.append(f"{section}.offload=[block]")
    shorter = [f"data.seq_len={data.seq_len // 2}"] if data.seq_len >= 4 else []
    if config.phases and (length := config.phases[number].seq_len) is not None:
        shorter = [f"phases.{number}.seq_len={length // 2}"]  # may conflict with earlier phases
    settings += shorter
    return settings


def estimate(config: RunConfig, world: int) -> int:
    """Returns the peak bytes of the fullest process."""
    from trainer.planning.dry_run import count_memory

    counted = count_memory(config, world)
    return counted.fullest.total + counted.triton


def compare(path: str, world: int, step: int) -> str:
    """Returns the advice: the memory of the config at a step, and the settings that save most."""
    config = load_config(path).at_step(step)
    sizes: dict[str, int] = {}
    for setting in candidates(config):
        try:
            sizes[setting] = estimate(load_config(path, [setting]).at_step(step), world)
        except ConfigError:  # conflicts with the other settings
            continue
    now = estimate(config, world)
    better = sorted((size, setting) for setting, size in sizes.items() if size < now)
    suggested = better[:MAX_SUGGESTIONS]
    if not suggested:
        return (
            f"the run takes about {gib(now)} per process, and no other recomputation or row length "
            "takes less; use more processes"
        )
    listing = ", ".join(f"{setting} (about {gib(size)})" for size, setting in suggested)
    return f"the run takes about {gib(now)} per process; these settings save most: {listing}"


if __name__ == "__main__":
    print(compare(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
