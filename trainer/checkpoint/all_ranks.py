"""Work on files by all ranks together: a failure on one of them is raised on all."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from data.files import fsync_folder
from data.storage import AnyPath, StoragePath
from trainer.files import sync_tree
from trainer.parallel.collectives import all_gather_objects
from trainer.parallel.grid import Axis

Item = TypeVar("Item")


def on_all_ranks(action: Callable[[], Item], axis: Axis) -> list[Item]:
    """Returns every rank's result of `action`, by rank; an OSError on any rank is raised on all.

    Otherwise a rank whose disk is full would leave the others waiting in a collective.
    """
    outcome: Item | OSError
    try:
        outcome = action()
    except OSError as error:
        outcome = OSError(error.errno, error.strerror)
    outcomes = all_gather_objects(outcome, axis)
    for result in outcomes:
        if isinstance(result, OSError):
            raise result
    return [item for item in outcomes if not isinstance(item, OSError)]


UNFINISHED = ".unfinished"
"""In a folder in object storage that is being written, or whose writing was killed."""


@contextmanager
def new_folder(path: AnyPath, axis: Axis) -> Iterator[AnyPath]:
    """Yields a temporary folder for all ranks, which is renamed to `path` after the block.

    An empty folder at `path` is replaced. In object storage, `path` itself is yielded, and has an
    object `UNFINISHED` until the block ends. After an error, which the block has to raise on all
    ranks, what was written is removed. Raises OSError on all ranks.
    """
    if isinstance(path, StoragePath):
        with _marked_folder(path, axis):
            yield path
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        on_all_ranks(lambda: _make(temporary) if axis.is_first else None, axis)
        yield temporary
        on_all_ranks(lambda: _publish(temporary, path) if axis.is_first else None, axis)
    except BaseException:
        if axis.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def _marked_folder(path: StoragePath, axis: Axis) -> Iterator[None]:
    def begin() -> None:
        path.remove_tree()
        (path / UNFINISHED).write("")

    try:
        on_all_ranks(lambda: begin() if axis.is_first else None, axis)
        yield
        on_all_ranks(lambda: (path / UNFINISHED).unlink() if axis.is_first else None, axis)
    except BaseException:
        if axis.is_first:
            with suppress(OSError):
                path.remove_tree()
        raise


def _make(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _publish(temporary: Path, path: Path) -> None:
    sync_tree(temporary)
    os.replace(temporary, path)
    fsync_folder(path.parent)
