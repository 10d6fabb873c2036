"""`fit_to_memory`: microbatches and recomputation for the memory of the device that a run finds.

Of the settings that give the same training, those that compute least again are tried first, with
the longest microbatches that fit, by the count of `v4 plan --dry-run`. Every process decides for
itself; the check of all configs before a run sees to it that all decided alike.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from trainer.config import ConfigError, RunConfig
from trainer.device import DeviceInfo
from trainer.formatting import GIB, gib
from trainer.parallel.grid import local_device
from trainer.planning.dry_run import dry_run
from trainer.planning.static_memory import snapshot_memory

ROOM = 0.9
"""Share of the memory that the count may take: it knows neither what an allocator wastes nor that
routing is uneven."""
TOKENS = 32_768
"""Of a microbatch at most, or one row: products are long enough by then."""
AGAIN: tuple[dict[str, tuple[str, ...]], ...] = (
    {"recompute": (), "offload": ()},
    {"recompute": ("norms", "streams"), "offload": ()},
    {"recompute": ("attention", "norms", "streams"), "offload": ()},
    {"recompute": ("block",), "offload": ()},
    {"recompute": ("block",), "offload": ("block",)},
)
"""What is computed again, from the least to the most."""


def fitted(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """`fit` for this process's device where the config asks for it, and a line about it.

    Called before there is a process group.
    """
    if not config.fit_to_memory:
        return config, []
    rank, world = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    device = local_device(int(os.environ.get("LOCAL_RANK", "0")))
    count = Count(world, on_host=device.type == "cpu", tell=rank == 0)
    config, words = fit(config, world, DeviceInfo.of(device), count)
    return config, [words]


def fit(config: RunConfig, world: int, card: DeviceInfo, count: Count) -> tuple[RunConfig, str]:
    """The config with `data.micro_batch_size`, `parallel.recompute` and `parallel.offload` for a card.

    Also a line about them. `count` gives the bytes of the fullest process. Raises ConfigError where
    nothing fits, or as `RunConfig.degrees`.
    """
    room = int(ROOM * (card.memory // GIB * GIB))  # GPUs of a kind differ by some MiB
    rows = micro_batch_size(config, world)
    least = 0
    for again in AGAIN:
        tried = [_with(config, world, n, again) for n in rows]
        found = [one for one in tried if one is not None]
        if not found:
            continue
        least = count(found[0])
        if least > room:
            continue
        for one in reversed(found):
            size = least if one is found[0] else count(one)
            if size <= room:
                return one, _words(one, card, size)
    raise ConfigError(
        f"fit_to_memory: with the settings that need least a process asks for about {gib(least)}, and "
        f"{ROOM:.0%} of the memory of {card.name} are {gib(room)}; take more processes, or rows "
        f"shorter than data.seq_len = {config.data.seq_len}"
    )


def micro_batch_size(config: RunConfig, world: int) -> Sequence[int]:
    """What `data.micro_batch_size` may be, from the least on; in a pipeline what it is, for its bubbles.

    Each divides the rows of a rank, so that none computes filler rows for it.
    """
    if config.parallel.pipeline > 1:
        return [config.data.micro_batch_size]
    of_rank = -(-config.data.global_batch_size // config.degrees(world).data)
    most = max(TOKENS // config.data.seq_len, 1)
    return [n for n in range(1, min(most, of_rank) + 1) if of_rank % n == 0]


def _with(config: RunConfig, world: int, rows: int, again: dict[str, Any]) -> RunConfig | None:
    """The config with these settings; None where they do not go together with the others."""
    values = config.to_dict()
    values["data"]["micro_batch_size"] = rows
    values["parallel"] |= again
    try:
        changed = RunConfig.model_validate_json(json.dumps(values), strict=True)
        changed.check_world(world)
    except (ValidationError, ConfigError):
        return None
    return changed


def _words(config: RunConfig, card: DeviceInfo, size: int) -> str:
    parallel = config.parallel
    return (
        f"fit_to_memory: data.micro_batch_size = {config.data.micro_batch_size}, parallel.recompute = "
        f"[{', '.join(parallel.recompute)}] and parallel.offload = "
        f"[{', '.join(parallel.offload)}] take about {gib(size)} of the {gib(card.memory)} of "
        f"{card.name}"
    )


class Count:
    """Bytes that the fullest process holds at most.

    Arguments:
        on_host: count the snapshots of `stability.spikes`, too, which are in the host's memory.
        tell: say on stderr how far it is.
    """

    def __init__(self, world: int, on_host: bool, tell: bool) -> None:
        self.world, self.on_host, self.tell = world, on_host, tell
        self.start, self.done = time.monotonic(), 0

    def __call__(self, config: RunConfig) -> int:
        size = dry_run(config, self.world).fullest.total
        if self.on_host:
            size += snapshot_memory(config, config.degrees(self.world))
        self.done += 1
        if (spent := time.monotonic() - self.start) > 3 and self.tell:
            most = len(AGAIN) + len(micro_batch_size(config, self.world))
            print(
                f"fit_to_memory: {self.done} of at most {most} settings counted, {spent:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        return size
