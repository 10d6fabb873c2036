"""Out of memory: which settings would help most, each with what a process would then hold.

The estimates are those of `v4 plan --dry-run`, made in a process of its own: the one that failed
may be part of a process group, and its device is full.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trainer.config import ConfigError, RunConfig, load_config
from trainer.errors import OutOfMemoryError
from trainer.formatting import gib
from trainer.parallel.grid import Grid

SETTINGS = 3
SECONDS = 900


@contextmanager
def advised(config: RunConfig, grid: Grid) -> Iterator[None]:
    """Turns a full device inside the block into a sentence with advice.

    Raises OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).split(". ")[0]
        raise OutOfMemoryError(
            f"{grid.device}: {first}; {advice(config, grid.world_size)}"
        ) from None


def advice(config: RunConfig, world: int) -> str:
    """The settings that would help most, in words, from a process of its own."""
    if config.engine != "native":
        return "try a smaller data.micro_batch_size or data.seq_len"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_", "LOCAL_"))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(config.to_yaml())
        command = [sys.executable, "-m", "trainer.planning.out_of_memory", str(path), str(world)]
        try:
            done = subprocess.run(
                command, env=kept, capture_output=True, text=True, timeout=SECONDS, check=True
            )
        except subprocess.SubprocessError:
            return "v4 plan --dry-run says what a config would hold"
    return done.stdout.strip()


def candidates(config: RunConfig) -> list[str]:
    """Settings that make less memory of the same training, and the row length, which does not."""
    data, recompute = config.data, set(config.parallel.recompute)
    found = []
    if data.micro_batch_size > 1:
        found.append(f"data.micro_batch_size={max(data.micro_batch_size // 2, 1)}")
    for parts in (["norms", "streams"], ["attention", "norms", "streams"], ["block"]):
        if "block" not in recompute and not set(parts) <= recompute:
            found.append(f"parallel.recompute=[{','.join(parts)}]")
    if "block" in recompute and "block" not in config.parallel.offload:
        found.append("parallel.offload=[block]")
    found.append(f"data.seq_len={data.seq_len // 2}")
    return found


def estimate(config: RunConfig, world: int) -> int:
    """Bytes that the fullest process holds at most."""
    from trainer.planning.dry_run import dry_run

    return dry_run(config, world).fullest.total


def told(path: str, world: int) -> str:
    """The advice: the best settings first, beside what the run as it is asks for."""

    config = load_config(path)
    sizes: dict[str, int] = {}
    for setting in candidates(config):
        try:
            sizes[setting] = estimate(load_config(path, [setting]), world)
        except ConfigError:  # does not fit the other settings
            continue
    now = estimate(config, world)
    best = sorted((size, setting) for setting, size in sizes.items() if size < now)[:SETTINGS]
    words = ", ".join(f"{setting} (about {gib(size)})" for size, setting in best)
    return f"it asks for about {gib(now)} a process; what would help most: {words}"


if __name__ == "__main__":
    print(told(sys.argv[1], int(sys.argv[2])))
