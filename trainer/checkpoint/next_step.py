"""The step that a run trains next, on which its processes agree before they are connected.

Its phase decides the degrees that they connect with.
"""

from __future__ import annotations

import os

import torch.distributed as dist

from trainer.checkpoint.folder import checkpoints_in, step_of
from trainer.config import RunConfig

_KEY = "v4/next_step"


def at_next_step(config: RunConfig, store: dist.Store | None) -> RunConfig:
    """Returns the run with the segment of the step after its newest checkpoint.

    The first process looks for all: on a network file system others may not see it yet. `store` is
    that of the processes, None for a single one.
    """
    if store is None:
        return config.at_step(_steps_done(config))
    if os.environ["RANK"] == "0":
        store.set(_KEY, str(_steps_done(config)))
    return config.at_step(int(store.get(_KEY)))


def _steps_done(config: RunConfig) -> int:
    return max(map(step_of, checkpoints_in(config.checkpoints)), default=0)
