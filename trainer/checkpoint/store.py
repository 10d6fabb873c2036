"""Where checkpoints are written and published: a file system, or object storage.

One rank at a time calls a store. Between `begin` and `publish` all ranks write their files into the
folder that `begin` returned; a kill at any moment leaves the published checkpoints as they are.

    file system     .step-00000020.TOKEN.tmp/    renamed to step-00000020/ once it is complete
    object storage  step-00000020/TOKEN-NAME     complete once manifest.json, the last, names them

TOKEN differs between attempts: a process that was stopped for so long that another one has taken
over the run does not write over that one's files. The checkpoint of a step that was undone and is
trained again stays until the new one is complete: in object storage the manifest names the files
of the one or of the other, on a file system the old folder counts under another name until the new
one has its own.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from data.files import fsync_folder
from data.storage import AnyPath, StoragePath
from trainer.checkpoint import manifest
from trainer.config.published import (
    folder_name,
    is_published,
    mentioned,
    published,
    read_steps,
    replaced_name,
    step_of,
    write_steps,
)
from trainer.files import remove_folder, write_synced

STATE_FILE = "state.json"


class Store(Protocol):
    """What both kinds of storage do; all raise OSError."""

    def begin(self, step: int, token: str) -> AnyPath:
        """Removes what killed saves left, and returns the folder for a step's files."""

    def publish(
        self, step: int, token: str, files: dict[str, manifest.FileRecord], state: dict[str, Any]
    ) -> None:
        """Completes what was begun: `files` by all ranks, and `state.json`."""

    def has_published(self, step: int, token: str) -> bool:
        """Whether the step's checkpoint is the one that this attempt wrote."""

    def abandon(self, step: int, token: str) -> None:
        """Removes what was begun and cannot be completed; never what was published."""

    def remove(self, checkpoint: AnyPath) -> None:
        """Removes a checkpoint, of which no reader finds a part."""


def open_store(folder: AnyPath) -> Store:
    """Returns the store for a folder of checkpoints."""
    return ObjectStore(folder) if isinstance(folder, StoragePath) else LocalStore(folder)


class LocalStore:
    """A folder on a file system that all ranks see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, step: int, token: str) -> Path:
        """Makes a temporary folder."""
        put_back(self.folder)
        for left in self.folder.glob(".step-*"):  # by a save or a removal that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary = self._temporary(step, token)
        temporary.mkdir(parents=True)
        return temporary

    def publish(
        self, step: int, token: str, files: dict[str, manifest.FileRecord], state: dict[str, Any]
    ) -> None:
        """Renames the temporary folder, after its contents are on the disk."""
        temporary, target = self._temporary(step, token), self.folder / folder_name(step)
        write_synced(temporary / STATE_FILE, _text(state))
        manifest.write(temporary, files | manifest.record(temporary, [STATE_FILE]))
        fsync_folder(temporary)
        replaced = self.folder / replaced_name(step)
        if target.exists():  # of a step that was undone, and is trained again
            target.rename(replaced)
        temporary.rename(target)
        fsync_folder(target.parent)
        with suppress(OSError):
            remove_folder(replaced)

    def has_published(self, step: int, token: str) -> bool:
        """Whether the temporary folder, which was there, has got the checkpoint's name."""
        return (
            not self._temporary(step, token).exists() and (self.folder / folder_name(step)).is_dir()
        )

    def abandon(self, step: int, token: str) -> None:
        """Removes the temporary folder."""
        shutil.rmtree(self._temporary(step, token), ignore_errors=True)

    def remove(self, checkpoint: AnyPath) -> None:
        """Renames the folder, then removes it; first the one that it may have replaced."""
        assert isinstance(checkpoint, Path)
        remove_folder(self.folder / replaced_name(step_of(checkpoint)))
        remove_folder(checkpoint)

    def _temporary(self, step: int, token: str) -> Path:
        return self.folder / f".{folder_name(step)}.{token}.tmp"


def put_back(folder: AnyPath) -> None:
    """Renames a checkpoint that was being replaced when the run was killed, for the run's owner."""
    for path in [] if isinstance(folder, StoragePath) else published(folder):
        if path.name == replaced_name(step_of(path)):
            assert isinstance(path, Path)
            path.rename(path.with_name(folder_name(step_of(path))))


def object_name(token: str, name: str) -> str:
    """Returns the name of a file of one attempt in object storage."""
    return f"{token}-{name}"


class ObjectStore:
    """A folder in object storage."""

    def __init__(self, folder: StoragePath) -> None:
        self.folder = folder

    def begin(self, step: int, token: str) -> StoragePath:
        """Removes files without a manifest."""
        for path in mentioned(self.folder):
            if not is_published(path):
                self.remove(path)
        return self.folder / folder_name(step)

    def publish(
        self, step: int, token: str, files: dict[str, manifest.FileRecord], state: dict[str, Any]
    ) -> None:
        """Writes the state, the step into `steps.json`, and at last the manifest.

        Then removes the files of other attempts, which no manifest names any more.
        """
        target, own = self.folder / folder_name(step), object_name(token, "")
        name = object_name(token, STATE_FILE)
        write_synced(target / name, _text(state))
        files = files | manifest.record(target, [name])
        write_steps(self.folder, {*read_steps(self.folder), step})
        manifest.write(target, files)
        with suppress(OSError):
            target.remove_tree(lambda other: other != manifest.NAME and not other.startswith(own))

    def has_published(self, step: int, token: str) -> bool:
        """Whether the manifest names this attempt's files."""
        files, _ = manifest.read(self.folder / folder_name(step))
        return object_name(token, STATE_FILE) in files

    def abandon(self, step: int, token: str) -> None:
        """Removes this attempt's files, unless the storage is unreachable; `begin` does it then.

        An attempt whose manifest was written, whatever happened afterwards, is published.
        """
        own = object_name(token, "")
        with suppress(OSError):
            if not self.has_published(step, token):
                (self.folder / folder_name(step)).remove_tree(lambda name: name.startswith(own))

    def remove(self, checkpoint: AnyPath) -> None:
        """Removes the manifest, then the files."""
        assert isinstance(checkpoint, StoragePath)
        (checkpoint / manifest.NAME).unlink(missing_ok=True)
        checkpoint.remove_tree()
        steps = read_steps(self.folder)
        if step_of(checkpoint) in steps:
            write_steps(self.folder, {*steps} - {step_of(checkpoint)})


def _text(state: dict[str, Any]) -> str:
    return json.dumps(state, indent=1) + "\n"
