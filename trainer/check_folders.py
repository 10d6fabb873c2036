"""Checks that all ranks see the run's folders, and that what they hold can be written.

What cannot be written would only fail at the first save, and a host that sees another folder would
save into it.
"""

import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from data.storage import AnyPath, StoragePath
from trainer.config import RunConfig
from trainer.formatting import OnHost, where
from trainer.parallel.collectives import all_gather_objects
from trainer.parallel.grid import Grid
from trainer.process.errors import PreflightError, may_pass

FOLDER_TIMEOUT = 15.0  # seconds that a network file system may take to show a new file


def check_folders(
    everyone: Sequence[OnHost], config: RunConfig, grid: Grid, folder_timeout: float
) -> None:
    """Raises PreflightError, on all ranks, unless the run's folders can be used.

    With checkpoints in object storage only the first rank needs the run folder.
    """
    folder = config.checkpoints
    if isinstance(folder, StoragePath):
        _check_own_folder(everyone, config.run_dir, grid)
        _check_storage(everyone, folder, grid)
        return
    _check_folder(everyone, "run_dir", config.run_dir, grid, folder_timeout)
    if config.checkpoint.folder is None:
        _check_checkpoints(everyone, folder, grid, folder_timeout)
    else:
        _check_folder(everyone, "checkpoint.folder", folder, grid, folder_timeout)


def _check_folder(
    everyone: Sequence[OnHost], name: str, folder: Path, grid: Grid, folder_timeout: float
) -> None:
    """Raises unless all ranks see a file that the first one writes into the folder.

    `name` is what errors call it. What cannot be written would only fail at the first save.
    """
    token = folder / f".preflight-{secrets.token_hex(8)}"
    write_error = _write(token) if grid.is_first else ""
    try:
        problem, token_name = all_gather_objects((write_error, token.name), grid.world)[0]
        if problem:
            raise PreflightError(
                f"{where([everyone[0]])} cannot write into {name} = {folder}: {problem}"
            )
        visible = all_gather_objects(_appears(folder / token_name, folder_timeout), grid.world)
        without = [facts for facts, good in zip(everyone, visible, strict=True) if not good]
        if without:
            raise PreflightError(
                f"{name} = {folder} is not the same folder on {where([everyone[0]])} and "
                f"{where(without)}; it should be on a file system that all hosts share"
            )
    finally:
        if grid.is_first and not write_error:
            token.unlink(missing_ok=True)


def _check_own_folder(everyone: Sequence[OnHost], folder: Path, grid: Grid) -> None:
    """Raises unless the first rank, which alone writes into the run's folder, can."""
    token = folder / f".preflight-{secrets.token_hex(8)}"
    write_error = _write(token) if grid.is_first else ""
    if problem := all_gather_objects(write_error, grid.world)[0]:
        raise PreflightError(
            f"{where([everyone[0]])} cannot write into run_dir = {folder}: {problem}"
        )
    if grid.is_first:
        token.unlink(missing_ok=True)


def _check_storage(everyone: Sequence[OnHost], folder: StoragePath, grid: Grid) -> None:
    """Raises unless all ranks see an object that the first one writes into the folder."""
    token = folder / f".preflight-{secrets.token_hex(8)}"
    write_error = _write(token) if grid.is_first else ""
    problem, name = all_gather_objects((write_error, token.name), grid.world)[0]
    if problem:
        raise PreflightError(
            f"{where([everyone[0]])} cannot write into checkpoint.folder = {folder}: {problem}"
        )
    reasons = all_gather_objects(_why_unseen(folder / name), grid.world)
    if grid.is_first:
        token.unlink(missing_ok=True)
    for facts, reason in zip(everyone, reasons, strict=True):
        if reason:
            raise PreflightError(
                f"{where([facts])} cannot read what {where([everyone[0]])} wrote into "
                f"checkpoint.folder = {folder}: {reason}; every host needs the same endpoint, and "
                "credentials"
            )


def _why_unseen(token: StoragePath) -> str:
    """Returns why an object cannot be read; empty where it can."""
    try:
        token.read_bytes()
    except OSError as error:
        if may_pass(error):
            raise
        return error.strerror or type(error).__name__
    return ""


def _check_checkpoints(
    everyone: Sequence[OnHost], folder: Path, grid: Grid, folder_timeout: float
) -> None:
    """Raises if `folder`, of a run that resumes or on another disk, cannot be written.

    Writes only through a link: a resume that is refused leaves the folder as it was.
    """
    if not all_gather_objects(folder.exists(), grid.world)[0]:
        return
    if all_gather_objects(folder.is_symlink(), grid.world)[0]:
        _check_folder(everyone, "checkpoints", folder, grid, folder_timeout)
        return
    problem = "" if os.access(folder, os.W_OK | os.X_OK) else "Permission denied"
    if not folder.is_dir():
        problem = "it is no folder"
    for facts, text in zip(everyone, all_gather_objects(problem, grid.world), strict=True):
        if text:
            raise PreflightError(f"{where([facts])} cannot write into {folder}: {text}")


def _write(token: AnyPath) -> str:
    """Writes the file; returns the reason if that is not possible, else an empty text."""
    try:
        if isinstance(token, StoragePath):
            token.write("")
            return ""
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
    except OSError as error:
        if may_pass(error):
            raise
        return error.strerror or type(error).__name__
    return ""


def _appears(path: Path, seconds: float) -> bool:
    """Whether the file exists, or appears within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            # Listing the folder makes a network file system update its cache.
            if path.name in os.listdir(path.parent):
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
