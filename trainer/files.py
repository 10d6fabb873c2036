"""Durable writes, local copies of objects, and folders that disappear at once."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.files import fsync_file, fsync_folder
from data.storage import AnyPath, StoragePath


def write_synced(path: AnyPath, text: str) -> None:
    """Writes a text file and waits until it is on the disk, or in the storage."""
    if isinstance(path, StoragePath):
        path.write(text)
        return
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def local_copy(path: AnyPath) -> Iterator[Path]:
    """Yields a file's local path; of one in object storage, that of a copy that lasts as long."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="v4-") as folder:
        copy = Path(folder, path.name)
        path.download(copy)
        yield copy


@contextmanager
def local_original(path: AnyPath) -> Iterator[Path]:
    """Yields where to write a file; one for object storage is sent there after the block."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="v4-") as folder:
        original = Path(folder, path.name)
        yield original
        path.upload(original)


def remove_folder(folder: Path) -> None:
    """Removes a folder, after renaming it, so that no reader finds a half-removed one."""
    if not folder.exists():
        return
    renamed = folder.with_name(f".{folder.name.lstrip('.')}.removed")
    shutil.rmtree(renamed, ignore_errors=True)
    folder.rename(renamed)
    shutil.rmtree(renamed)


def sync_tree(folder: Path) -> None:
    """Makes every file below `folder`, and the folders themselves, durable."""
    for root, _, names in os.walk(folder):
        for name in names:
            fsync_file(Path(root, name))
        fsync_folder(Path(root))
