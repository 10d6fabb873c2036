"""Files that appear whole or not at all, durable writes, and what files of a run store."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from data.errors import DataError
from data.storage import AnyPath, StoragePath


def sha256_of(path: AnyPath) -> str:
    """Hex sha256 of a file's bytes."""
    if isinstance(path, StoragePath):
        digest = hashlib.sha256()
        for block in path.blocks():
            digest.update(block)
        return digest.hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_inside(name: str) -> str:
    """Returns a name that a file stores of another, relative to the folder that both are in.

    Raises ValueError for one that leads out of the folder: a copied or renamed folder would be read
    and written in another place.
    """
    if name.startswith("/") or ".." in name.split("/"):  # pathlib would take 20 µs a name
        raise ValueError(f"{name!r} should be a relative path inside the folder, without ..")
    return name


InsidePath = Annotated[str, AfterValidator(check_inside)]


def read_step_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the objects with a `step` in the lines of a metrics file, and how many lines lack it.

    A last line without its end, which is being written or was torn by a crash, does not count.
    """
    records, others = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
        else:
            others += line.endswith(b"\n")
    return records, others


def fsync_folder(folder: Path) -> None:
    """Makes the names inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Makes the bytes of a closed file durable."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def write_atomically(path: AnyPath, content: str | bytes) -> None:
    """Writes `path` so that a reader sees the old file or the whole new one.

    Text is written as UTF-8, without translating line ends. Missing parent folders are created.
    Raises DataError where the disk is full or the folder cannot be written.
    """
    if isinstance(content, str):
        content = content.encode()
    if isinstance(path, StoragePath):
        try:
            path.write(content)
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}.") from error
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}.") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror}; the file that was there is unchanged."
        ) from error
    finally:
        Path(name).unlink(missing_ok=True)  # no longer there once renamed
