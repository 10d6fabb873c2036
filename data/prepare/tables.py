"""What is put together of all parts once they are complete: counts of ids, lengths of documents."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.documents import by_source, open_tables, table_file
from data.indexed import token_dtype
from data.manifest import SPLITS, Manifest, Shard
from data.prepare.work_item import WorkItem
from data.prepare.write_part import PartRecord, counts_of
from data.token_counts import save_counts

Parts = list[tuple[WorkItem, PartRecord]]


def add_counts(parts: Parts, folder: Path) -> str:
    """Writes how often each id is an input in the train split, by source; returns the SHA-256."""
    counts: dict[str, NDArray[np.int64]] = {}
    for item, record in parts:
        if any(shard.split == "train" for shard in record.shards):
            of_part = counts_of(item.name, folder, "counts")
            name = item.source.name
            counts[name] = counts[name] + of_part if name in counts else of_part
    return save_counts(folder, counts)


def write_tables(parts: Parts, folder: Path, manifest: Manifest) -> None:
    """Writes the tables of documents, which loaders would make of the indexes."""
    names = {shard.name: item.name for item, record in parts for shard in record.shards}

    def read_lengths(shard: Shard) -> tuple[np.dtype[Any], NDArray[np.int64]]:
        lengths = counts_of(names[shard.name], folder, shard.split)
        return token_dtype(manifest.vocab_size), lengths

    for split in SPLITS:
        if shards := by_source(manifest.of_split(split)):
            open_tables(table_file(folder, split), manifest.digest, shards, read_lengths)
