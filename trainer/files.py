"""Durable writes, and folders that disappear at once."""

import os
import shutil
from pathlib import Path

from data.files import fsync_file, fsync_folder


def write_synced(path: Path, text: str) -> None:
    """Writes a text file and waits until it is on the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def remove_folder(folder: Path) -> None:
    """Removes a folder, after renaming it, so that no reader finds a half-removed one."""
    if not folder.exists():
        return
    renamed = folder
    if not folder.name.startswith("."):
        renamed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(renamed, ignore_errors=True)
        folder.rename(renamed)
    shutil.rmtree(renamed)


def sync_tree(folder: Path) -> None:
    """Makes every file below `folder`, and the folders themselves, durable."""
    for root, _, names in os.walk(folder):
        for name in names:
            fsync_file(Path(root, name))
        fsync_folder(Path(root))
