"""The work of one process of `prepare`: a unit to one part of its source's shards.

A unit is the grain of resuming. Its files get their names only when they are whole, and the record
`*.json` comes last: a unit with a record is done, anything else is done again.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from data.errors import DataError
from data.files import fsync_file, write_atomically
from data.indexed import indexed_module, open_shard
from data.manifest import Loss, Shard
from data.prepare.corpus import BadRecord, Corpus
from data.prepare.splits import is_validation
from data.prepare.work_item import Unit, batches
from data.sieve import Filtered, Sieve
from data.text import Tokenizer, encode_segments

_SPLITS = ("train", "validation")


class UnitRecord(BaseModel):
    """What a finished unit holds; `bad` records are in the file `*.quarantine.jsonl`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shards: tuple[Shard, ...]
    documents: int
    empty: int
    bad: int
    losses: dict[str, Loss] = {}


def finished(unit: Unit, folder: Path) -> UnitRecord | None:
    """The record of a unit whose shards are all there and whole, otherwise None."""
    try:
        record = UnitRecord.model_validate_json((folder / f"{unit.name}.json").read_bytes())
        for shard in record.shards:
            open_shard(folder / shard.name, shard.documents, shard.tokens)
    except (OSError, ValidationError, DataError):
        return None
    return record


def run_unit(
    unit: Unit,
    tokenizer: Tokenizer,
    folder: Path,
    validation_fraction: float,
    tolerant: bool,
    advance: Callable[[int], None],
    filtered: Filtered | None = None,
) -> UnitRecord:
    """Write the shards of a unit into `folder`; a split without documents gets none.

    `tolerant` counts bad records and goes on, otherwise the first is an error. `advance` is told
    the UTF-8 bytes of the documents as they are done. `filtered` leaves documents out. Raises
    DataError for what cannot be read and OSError for what cannot be written.
    """
    corpus = Corpus(unit.source, unit.files)
    writers = {split: _Writer(unit, split, folder, tokenizer) for split in _SPLITS}
    bad: list[BadRecord] = []
    sieve = None if filtered is None else Sieve(filtered, unit, folder)
    try:
        for batch in batches(corpus.documents(bad if tolerant else None)):
            kept = batch if sieve is None else sieve.kept(batch)
            ids_of = encode_segments([d.segments or (d.text,) for d in kept], tokenizer)
            for document, ids in zip(kept, ids_of, strict=True):
                held = is_validation(unit.source, document.text, validation_fraction)
                writers["validation" if held else "train"].add(ids, len(document.text.encode()))
            advance(sum(len(document.text.encode()) for document in batch))
        losses = {} if sieve is None else sieve.close()
        for writer in writers.values():
            writer.close()
        shards = [shard for writer in writers.values() if (shard := writer.finish()) is not None]
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise
    if bad:
        lines = [json.dumps(record._asdict(), ensure_ascii=False) + "\n" for record in bad]
        write_atomically(folder / f"{unit.name}.quarantine.jsonl", "".join(lines).encode())
    record = UnitRecord(
        shards=tuple(shards),
        documents=sum(shard.documents for shard in shards),
        empty=corpus.empty,
        bad=len(bad),
        losses=losses,
    )
    write_atomically(folder / f"{unit.name}.json", record.model_dump_json().encode())
    return record


class _Writer:
    """One `.bin/.idx` pair in the making, under names of this process until it is whole."""

    def __init__(self, unit: Unit, split: Any, folder: Path, tokenizer: Tokenizer):
        module = indexed_module()
        self.source, self.split = unit.source, split
        self.prefix = folder / f"{unit.source.name}-{split}-{unit.number:05d}"
        self.aside = folder / f".{self.prefix.name}.{os.getpid()}"
        self.tokenizer = tokenizer
        dtype = module.DType.optimal_dtype(tokenizer.vocab_size)
        self.builder = module.IndexedDatasetBuilder(f"{self.aside}.bin", dtype=dtype)
        self.dtype = dtype
        self.documents = self.tokens = self.bytes = 0

    def add(self, ids: list[int], size: int) -> None:
        """Append one document of `size` UTF-8 bytes."""
        eos = self.tokenizer.eos_id
        end = [] if ids and ids[-1] == eos else [eos]  # an answer ends with eos already
        document = np.array([self.tokenizer.bos_id, *ids, *end], dtype=self.dtype)
        self.builder.add_document(document, [len(document)])
        self.documents += 1
        self.tokens += len(document)
        self.bytes += size

    def close(self) -> None:
        """Flush the tokens."""
        self.builder.data_file.close()

    def discard(self) -> None:
        """Remove the files that are not whole; safe to call when writing has failed."""
        with suppress(OSError):  # the disk is full: what was not flushed is not wanted either
            self.builder.data_file.close()
        for ending in (".bin", ".idx"):
            Path(f"{self.aside}{ending}").unlink(missing_ok=True)

    def finish(self) -> Shard | None:
        """Write the index, make both files durable and give them their names."""
        if not self.documents:
            self.discard()
            return None
        self.builder.finalize(f"{self.aside}.idx")
        for ending in (".bin", ".idx"):
            fsync_file(Path(f"{self.aside}{ending}"))
            os.replace(f"{self.aside}{ending}", f"{self.prefix}{ending}")
        return Shard(
            source=self.source.name,
            domain=self.source.domain,
            split=self.split,
            name=self.prefix.name,
            documents=self.documents,
            tokens=self.tokens,
            bytes=self.bytes,
        )
