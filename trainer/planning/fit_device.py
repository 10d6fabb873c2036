"""`fit_to_memory`: microbatches and recomputation for the memory of a run's device.

Of the settings that give the same training, those with least recomputation are tried first, with
the largest microbatches that fit, by the count of `v4 plan --dry-run`. Every process decides for
itself; preflight checks that all of them decided the same.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import ValidationError

from data.activity import print_line
from trainer.config import ConfigError, RunConfig
from trainer.device import DeviceInfo
from trainer.formatting import GIB, gib
from trainer.planning.dry_run import count_memory
from trainer.planning.static_memory import snapshot_memory

MEMORY_FRACTION = 0.9
"""Fraction of the memory that the count may take: it includes neither fragmentation nor uneven
routing."""
MAX_TOKENS = 32_768
"""Maximum of a microbatch, unless it is one row: matmuls are large enough by then."""
RECOMPUTATION: tuple[dict[str, tuple[str, ...]], ...] = (
    {"recompute": (), "offload": ()},
    {"recompute": ("norms", "streams"), "offload": ()},
    {"recompute": ("attention", "norms", "streams"), "offload": ()},
    {"recompute": ("block",), "offload": ()},
    {"recompute": ("block",), "offload": ("block",)},
)
"""Settings of recomputation, from none to all."""


def fit_to_device(
    config: RunConfig, device: torch.device, processes: int | None = None
) -> tuple[RunConfig, list[str]]:
    """Applies `fit` for this process's `device` if the config asks for it; also returns log lines.

    Called before there is a process group. `processes` of the run are by default this job's.
    """
    if not config.fit_to_memory:
        return config, []
    rank, world = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    world = processes or world
    count = Count(world, on_host=device.type == "cpu", log=rank == 0)
    config, line = fit(config, world, DeviceInfo.of(device), count)
    return config, [line]


def fit(config: RunConfig, world: int, device: DeviceInfo, count: Count) -> tuple[RunConfig, str]:
    """Chooses `data.micro_batch_size`, `parallel.recompute` and `parallel.offload` for a device.

    Returns the config and a line about it. `count` gives the bytes of the fullest process. Raises
    ConfigError if nothing fits, or as `RunConfig.degrees`.
    """
    limit = int(MEMORY_FRACTION * (device.memory // GIB * GIB))  # GPUs of a kind differ by some MiB
    rows = micro_batch_sizes(config, world)
    smallest = 0
    for recomputation in RECOMPUTATION:
        candidates = [_with(config, world, n, recomputation) for n in rows]
        valid = [candidate for candidate in candidates if candidate is not None]
        if not valid:
            continue
        smallest = count(valid[0])
        if smallest > limit:
            continue
        for candidate in reversed(valid):
            size = smallest if candidate is valid[0] else count(candidate)
            if size <= limit:
                return candidate, _describe(candidate, device, size)
    raise ConfigError(
        f"fit_to_memory: the smallest settings take about {gib(smallest)} per process, and "
        f"{MEMORY_FRACTION:.0%} of the memory of {device.name} is {gib(limit)}; use more "
        f"processes, or rows shorter than data.seq_len = {config.data.seq_len}"
    )


def micro_batch_sizes(config: RunConfig, world: int) -> Sequence[int]:
    """Returns candidates for `data.micro_batch_size`, ascending; a pipeline keeps its own.

    Each divides the rows that a rank has of `data.global_batch_size`, so that these need no filler
    rows; phases and ramps with other numbers of rows may get some. The number of microbatches of a
    pipeline determines its bubbles.
    """
    if config.segment.parallel.pipeline > 1:
        return [config.data.micro_batch_size]
    of_rank = -(-config.data.global_batch_size // config.degrees(world).data)
    largest = max(MAX_TOKENS // config.data.seq_len, 1)
    return [n for n in range(1, min(largest, of_rank) + 1) if of_rank % n == 0]


def _with(
    config: RunConfig, world: int, rows: int, recomputation: dict[str, Any]
) -> RunConfig | None:
    """Returns the config with these settings; None if they conflict with the others."""
    values = config.to_dict()
    values["data"]["micro_batch_size"] = rows
    values["parallel"] |= recomputation
    for phase in values["phases"]:
        if phase["parallel"] is not None:
            phase["parallel"] |= dict.fromkeys(recomputation)
    try:
        changed = RunConfig.model_validate_json(json.dumps(values), strict=True)
        changed.check_world(world)
    except (ValidationError, ConfigError):
        return None
    return changed.at_step(config.segment.first)


def _describe(config: RunConfig, device: DeviceInfo, size: int) -> str:
    parallel = config.segment.parallel
    return (
        f"fit_to_memory: data.micro_batch_size = {config.data.micro_batch_size}, "
        f"parallel.recompute = [{', '.join(parallel.recompute)}] and parallel.offload = "
        f"[{', '.join(parallel.offload)}] take about {gib(size)} of the {gib(device.memory)} of "
        f"{device.name}"
    )


class Count:
    """Counts the peak bytes of the fullest process.

    Arguments:
        on_host: also count the snapshots of `stability.spikes` and offloaded activations, which
            are in host memory; on a GPU what Triton's attention takes is counted instead.
        log: report progress on stderr.
    """

    def __init__(self, world: int, on_host: bool, log: bool) -> None:
        self.world, self.on_host, self.log = world, on_host, log
        self.start, self.done = time.monotonic(), 0

    def __call__(self, config: RunConfig) -> int:
        counted, degrees = count_memory(config, self.world), config.degrees(self.world)
        size = counted.fullest.total
        if self.on_host:
            size += counted.fullest.offloaded + snapshot_memory(config, degrees)
        else:
            size += counted.triton
        self.done += 1
        if (spent := time.monotonic() - self.start) > 3 and self.log:
            total = len(RECOMPUTATION) + len(micro_batch_sizes(config, self.world))
            print_line(
                f"fit_to_memory: {self.done} of at most {total} settings counted, {spent:.0f} s",
                sys.stderr,
            )
        return size
