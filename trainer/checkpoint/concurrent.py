"""Reads the newest checkpoint of a run that may be training, and removing old ones, meanwhile."""

import sys
from collections.abc import Callable
from typing import TypeVar

from data.activity import print_line
from data.storage import AnyPath
from trainer.checkpoint import manifest
from trainer.checkpoint.folder import CheckpointFolder, checkpoints_in
from trainer.parallel.collectives import all_gather_objects
from trainer.process.errors import CheckpointError

Item = TypeVar("Item")
Version = tuple[AnyPath, bytes]
"""A checkpoint and the contents of its manifest."""
_REPEATS = 4


def read_newest(folder: CheckpointFolder, read: Callable[[], Item]) -> Item:
    """Returns `read()`, which reads the newest checkpoint of `folder`; every rank calls it.

    If that checkpoint was removed or replaced meanwhile, it is called again for the newest one, a
    few times. `read` raises on all ranks or on
    none.

    Raises CheckpointError where there is no other.
    """
    newest = _newest(folder)
    for _ in range(_REPEATS):
        try:
            return read()
        except Exception as error:
            is_there = newest is None or newest == _as_it_is(newest[0])
            if all(all_gather_objects(is_there, folder.grid.world)):
                raise
            gone, newest = newest, _newest(folder)
            assert gone is not None
            if newest is None or newest == gone:
                raise CheckpointError(
                    f"{gone[0]}: was removed while it was read, and there is no other checkpoint"
                ) from error
            if folder.grid.is_first:
                text = f"v4: {gone[0]} was removed while it was read; reading {newest[0]}"
                print_line(text, sys.stderr)
    return read()


def _newest(folder: CheckpointFolder) -> Version | None:
    """Returns the newest checkpoint as the first rank sees it."""
    paths = checkpoints_in(folder.folder) if folder.grid.is_first else []
    own = _as_it_is(paths[-1]) if paths else None
    newest: Version | None = all_gather_objects(own, folder.grid.world)[0]
    return newest


def _as_it_is(checkpoint: AnyPath) -> Version:
    """Returns a checkpoint with the contents of its manifest, empty if it was removed."""
    try:
        return checkpoint, (checkpoint / manifest.NAME).read_bytes()
    except FileNotFoundError:
        return checkpoint, b""
