"""Reads the newest checkpoint of a run that may be training, and removing old ones, meanwhile."""

import sys
from collections.abc import Callable
from typing import TypeVar

from data.activity import print_line
from data.storage import AnyPath
from trainer.checkpoint.folder import CheckpointFolder, checkpoints_in
from trainer.config.published import is_published
from trainer.parallel.collectives import all_gather_objects
from trainer.process.errors import CheckpointError

Item = TypeVar("Item")
_REPEATS = 4


def read_newest(folder: CheckpointFolder, read: Callable[[], Item]) -> Item:
    """Returns `read()`, which reads the newest checkpoint of `folder`; every rank calls it.

    Where that checkpoint was removed meanwhile, it is called again for the one that is newest then,
    a few times. `read` raises on all ranks or on none.

    Raises CheckpointError where there is no other.
    """
    path = _newest(folder)
    for _ in range(_REPEATS):
        try:
            return read()
        except Exception as error:
            is_there = path is None or is_published(path)
            if all(all_gather_objects(is_there, folder.grid.world)):
                raise
            gone, path = path, _newest(folder)
            if path in (None, gone):
                raise CheckpointError(
                    f"{gone}: was removed while it was read, and there is no other checkpoint"
                ) from error
            if folder.grid.is_first:
                print_line(f"v4: {gone} was removed while it was read; reading {path}", sys.stderr)
    return read()


def _newest(folder: CheckpointFolder) -> AnyPath | None:
    """Returns the newest checkpoint as the first rank sees it."""
    paths = checkpoints_in(folder.folder) if folder.grid.is_first else []
    newest: AnyPath | None = all_gather_objects(paths[-1] if paths else None, folder.grid.world)[0]
    return newest
