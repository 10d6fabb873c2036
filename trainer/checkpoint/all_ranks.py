"""Work on files that all ranks do together: what fails on one of them fails on all."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from data.files import fsync_folder
from trainer.files import sync_tree
from trainer.parallel.collectives import gather_objects
from trainer.parallel.grid import Axis

Item = TypeVar("Item")


def on_all_ranks(action: Callable[[], Item], axis: Axis) -> list[Item]:
    """Every rank's result of `action`, by rank; an OSError on any rank is raised on all.

    Without this a rank whose disk is full would leave the others waiting in a collective.
    """
    outcome: Item | OSError
    try:
        outcome = action()
    except OSError as error:
        outcome = OSError(error.errno, error.strerror)
    outcomes = gather_objects(outcome, axis)
    for failed in outcomes:
        if isinstance(failed, OSError):
            raise failed
    return [item for item in outcomes if not isinstance(item, OSError)]


@contextmanager
def new_folder(path: Path, axis: Axis) -> Iterator[Path]:
    """A temporary folder beside `path`, for all ranks, that becomes `path` at a good end.

    An empty folder that is already at `path` is replaced. After an error, which the block has to
    raise on all ranks, nothing is left. Raises OSError on all ranks.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        on_all_ranks(lambda: _make(aside) if axis.is_first else None, axis)
        yield aside
        on_all_ranks(lambda: _publish(aside, path) if axis.is_first else None, axis)
    except BaseException:
        if axis.is_first:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _make(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)


def _publish(aside: Path, path: Path) -> None:
    sync_tree(aside)
    os.replace(aside, path)
    fsync_folder(path.parent)
