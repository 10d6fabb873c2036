"""How often each id is an input of training, by source; counted when the shards are made.

The tables of hash-routed layers are balanced by it (`data.rows.token_frequencies`). The last token
of a document, its eos, is never an input.

Letters: V vocabulary.
"""

import hashlib
import io
import zipfile
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.files import sha256_of, write_atomically
from data.indexed import open_shard
from data.manifest import Manifest
from data.storage import AnyPath, as_path

COUNTS_FILE = "token_counts.npz"


def write_counts(folder: AnyPath, manifest: Manifest) -> str:
    """Counts the inputs in the train split of the shards in `folder`; returns the file's SHA-256.

    The file has an array [V] int64 for each source. Raises DataError for an id beyond the
    vocabulary.
    """
    counts: dict[str, NDArray[np.int64]] = {}
    for shard in manifest.of_split("train"):
        total = counts.setdefault(shard.source, np.zeros(manifest.vocab_size, dtype=np.int64))
        prefix = folder / shard.name
        opened = open_shard(prefix, shard.documents, shard.tokens, manifest.vocab_size)
        for _, _, ids in opened.blocks():
            total += np.bincount(ids, minlength=len(total))
        total[manifest.eos_id] -= shard.documents
    return save_counts(folder, counts)


def save_counts(folder: AnyPath, counts: Mapping[str, NDArray[np.int64]]) -> str:
    """Writes the counts of each source [V] into `folder`; returns the file's SHA-256."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:  # np.savez takes not every name
        for source, count in counts.items():
            with archive.open(f"{source}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, count, allow_pickle=False)
    content = stream.getvalue()
    write_atomically(folder / COUNTS_FILE, content)
    return hashlib.sha256(content).hexdigest()


def read_counts(
    shards: str | AnyPath, manifest: Manifest
) -> Mapping[str, NDArray[np.int64]] | None:
    """Inputs by source and id, [V] each; None for shards that were made without counts.

    Raises DataError where the file of the counts is missing or damaged, OSError where it cannot be
    read.
    """
    if manifest.token_counts is None:
        return None
    path = as_path(shards) / manifest.folder / COUNTS_FILE
    try:
        if sha256_of(path) == manifest.token_counts:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
                return dict(arrays)
    except (FileNotFoundError, ValueError, zipfile.BadZipFile):
        pass
    raise DataError(f"{path} is missing or damaged; make it again with `v4 data prepare CONFIG`.")
