"""The files that one rank writes of a checkpoint, and how ranks learn that all have written theirs.

Where a process beside each rank writes, none has a connection to the others: each leaves an outcome
next to its files, which the first rank's process looks for. Imports no torch.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from data.files import fsync_folder
from data.held_lease import HeldLease, require_leases
from data.lease import LeaseError
from data.storage import AnyPath, Parts, StoragePath
from trainer.checkpoint.manifest import FileRecord
from trainer.checkpoint.store import Store, object_name
from trainer.config.published import published, step_of
from trainer.files import write_synced

Buffers = Iterable[bytes | memoryview]
_WRITE_BYTES = 16 << 20
"""Written and hashed at a time."""


@dataclass(frozen=True)
class NewCheckpoint:
    """A checkpoint that is being written: its step, where, and a name for this attempt."""

    step: int
    folder: AnyPath
    token: str

    def path(self, name: str) -> AnyPath:
        """Returns where a file of the checkpoint is written.

        In object storage the folder may have files of another attempt, which are not replaced: the
        token is part of each name. On a file system every attempt has its own folder.
        """
        is_object = isinstance(self.folder, StoragePath)
        return self.folder / (object_name(self.token, name) if is_object else name)

    def outcome_path(self, rank: int) -> AnyPath:
        """Returns where a rank leaves its outcome."""
        return self.path(f"written-{rank:05d}.json")


class Outcome(TypedDict, total=False):
    """What a rank leaves: its files, or why there are none."""

    files: dict[str, FileRecord]
    errno: int | None
    reason: str


def write_file(path: AnyPath, header: str, data: Buffers) -> FileRecord:
    """Writes a safetensors file, durably, and returns its size and SHA-256.

    Args:
        path: of the file.
        header: its JSON text.
        data: the bytes of its tensors.
    """
    digest, size = hashlib.sha256(), 0
    if isinstance(path, StoragePath):
        content = Parts(_parts_of_file(header, data))

        def hash_all() -> None:
            for part in content:
                digest.update(part)

        with ThreadPoolExecutor(1) as pool:
            hashing = pool.submit(hash_all)  # while the network is busy
            path.write(content)
        hashing.result()
        return {"size": len(content), "sha256": digest.hexdigest()}
    with path.open("wb") as stream:
        for part in _parts_of_file(header, data):
            digest.update(part)
            size += stream.write(part)
        stream.flush()
        os.fsync(stream.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def _parts_of_file(header: str, data: Buffers) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a safetensors file: the header's length, the header, and the tensors."""
    encoded = header.encode()
    yield struct.pack("<Q", len(encoded))
    yield encoded
    for buffer in data:
        view = memoryview(buffer)
        for start in range(0, len(view), _WRITE_BYTES):
            yield view[start : start + _WRITE_BYTES]


def write_outcome(new: NewCheckpoint, rank: int, outcome: Outcome) -> None:
    """Writes a rank's outcome, which appears whole."""
    path, text = new.outcome_path(rank), json.dumps(outcome)
    if isinstance(path, StoragePath):
        path.write(text)
        return
    part = path.with_name(f".{path.name}")
    write_synced(part, text)
    part.rename(path)
    fsync_folder(path.parent)


def read_outcomes(new: NewCheckpoint, ranks: Iterable[int]) -> dict[int, Outcome]:
    """Returns the outcomes of ranks, in their order up to the first one that has left none.

    They are asked for by name: a storage's list may lag behind. Raises OSError where the folder on
    a file system is gone.
    """
    if isinstance(new.folder, Path):
        os.listdir(new.folder)  # makes a network file system update its cache
    outcomes = {}
    for rank in sorted(ranks):
        try:
            text = new.outcome_path(rank).read_text(encoding="utf-8")
        except FileNotFoundError:
            break
        outcomes[rank] = json.loads(text)
    return outcomes


def remove_outcomes(new: NewCheckpoint, ranks: Iterable[int]) -> None:
    """Removes the outcomes, which are no part of a checkpoint."""
    for rank in ranks:
        new.outcome_path(rank).unlink(missing_ok=True)


def publish(
    new: NewCheckpoint,
    store: Store,
    leases: Iterable[HeldLease],
    files: dict[str, FileRecord],
    state: dict[str, Any],
) -> None:
    """Publishes what all ranks have written.

    Removes it instead, and raises LeaseError, where another process has taken over the run.
    """
    try:
        require_leases(leases)
    except LeaseError:
        store.abandon(new.step, new.token)
        raise
    store.publish(new.step, new.token, files, state)


def remove_later(folder: AnyPath, store: Store, leases: Iterable[HeldLease], step: int) -> None:
    """Removes the checkpoints after a step, which were undone. Raises LeaseError as `publish`."""
    later = [path for path in published(folder) if step_of(path) > step]
    if later:
        require_leases(leases)
    for path in later:
        store.remove(path)
