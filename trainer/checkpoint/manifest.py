"""The manifest of a checkpoint folder: size and SHA-256 of each file.

It is written last, so a folder with a valid manifest is complete.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import TypedDict

from data.files import check_inside, sha256_of
from data.storage import AnyPath, StoragePath, size_of
from trainer.config.published import MANIFEST_FILE as NAME
from trainer.files import write_synced
from trainer.process.errors import CheckpointError

_LISTED_FROM = 16


class FileRecord(TypedDict):
    """The manifest's entry of one file."""

    size: int
    """Bytes."""
    sha256: str


def share_of(names: list[str], rank: int, world_size: int) -> list[str]:
    """Returns the files that `rank` hashes, so that all ranks together read each file once."""
    return sorted(names)[rank::world_size]


def record(folder: AnyPath, names: list[str]) -> dict[str, FileRecord]:
    """Returns sizes and hashes of the named files as they are now."""
    return {
        name: {"size": size_of(folder / name), "sha256": sha256_of(folder / name)} for name in names
    }


def write(folder: AnyPath, files: dict[str, FileRecord]) -> None:
    """Writes the manifest, with a hash of itself."""
    document = {"files": files, "sha256": _digest(files)}
    text = json.dumps(document, indent=1, sort_keys=True) + "\n"
    write_synced(folder / NAME, text)


def read(folder: AnyPath) -> tuple[dict[str, FileRecord], str | None]:
    """Returns the manifest's files, and what is wrong with the manifest, or None.

    Raises OSError where it is there and cannot be read.
    """
    try:
        document = json.loads((folder / NAME).read_text(encoding="utf-8"))
        files, digest = document["files"], document["sha256"]
    except FileNotFoundError:
        return {}, f"{NAME} is missing"
    except (ValueError, KeyError, TypeError):
        return {}, f"{NAME} is truncated or altered"
    if not isinstance(files, dict) or digest != _digest(files):
        return {}, f"{NAME} was altered"
    try:
        for name in files:
            check_inside(name)
    except ValueError as error:
        return {}, f"{NAME}: {error}"
    return files, None


def problem(folder: AnyPath, files: dict[str, FileRecord], names: list[str]) -> str | None:
    """Returns what is wrong with the named files, or None; compares sizes before any hash."""
    if wrong := size_problem(folder, files, names):
        return wrong
    for name in names:
        if sha256_of(folder / name) != files[name]["sha256"]:
            return f"{name} was altered"
    return None


def size_problem(folder: AnyPath, files: dict[str, FileRecord], names: Iterable[str]) -> str | None:
    """Returns what is wrong with the named files without reading them, or None."""
    if isinstance(folder, StoragePath):
        return _object_size_problem(folder, files, list(names))
    if unknown := {path.name for path in folder.glob("*.safetensors")} - files.keys():
        return f"{min(unknown)} is not in {NAME}"
    for name in names:
        path, size = folder / name, files[name]["size"]
        if not path.is_file():
            return f"{name} is missing"
        if (actual := path.stat().st_size) != size:
            return f"{name} has {actual} bytes instead of {size}"
    return None


def _object_size_problem(
    folder: StoragePath, files: dict[str, FileRecord], names: list[str]
) -> str | None:
    """Returns what is wrong with objects; others beside them do not count.

    Few are asked for by name. The list of a folder, which may lag behind, is read for many.
    """
    listed = folder.sizes() if len(names) > _LISTED_FROM else {}
    for name in names:
        actual = listed.get(name)
        if actual is None and (facts := (folder / name).info()) is not None:
            actual = facts["size"]
        if actual is None:
            return f"{name} is missing"
        if actual != files[name]["size"]:
            return f"{name} has {actual} bytes instead of {files[name]['size']}"
    return None


def check_sizes(checkpoint: AnyPath) -> None:
    """Raises CheckpointError for a checkpoint with a file missing or of another size.

    Reads the manifest alone, for what has to be quick.
    """
    files, broken = read(checkpoint)
    if wrong := broken or size_problem(checkpoint, files, files):
        raise CheckpointError(
            f"{checkpoint} is damaged: {wrong}; restore it, or remove the folder to train on from "
            "the checkpoint before it"
        )


def _digest(files: dict[str, FileRecord]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
