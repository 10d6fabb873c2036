"""The work of one process of `prepare`: tokenises a work item to one part of its source's shards.

`prepare` resumes by work items. The files get their names only when they are complete, and the
record `*.json` is written last: an item with a record is done, any other is processed again.
"""

import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from data.errors import DataError
from data.files import fsync_file, write_atomically
from data.indexed import indexed_module, open_shard
from data.manifest import FilterStats, Shard, Split
from data.prepare.corpus import BadRecord, Corpus
from data.prepare.filter_pass import FilterSettings, VerdictFilter
from data.prepare.splits import is_validation
from data.prepare.task import Preparation, Task
from data.prepare.work_item import WorkItem, batches
from data.text import Tokenizer, encode_segments

_SPLITS: tuple[Split, ...] = ("train", "validation")


class PartRecord(BaseModel):
    """What a finished part holds; `bad` counts the records in the file `*.quarantine.jsonl`.

    `empty` counts documents, `empty_files` files without a record.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    shards: tuple[Shard, ...]
    documents: int
    empty: int
    bad: int
    empty_files: int = 0
    dropped: dict[str, FilterStats] = Field(
        default={}, validation_alias=AliasChoices("dropped", "losses")
    )


class WritePartTask(Task):
    """Tokenises one work item, whose name it has."""

    kind: Literal["write_part"] = "write_part"
    item: int

    def is_done(self, folder: Path) -> bool:
        """Whether the shards are complete."""
        return finished_part(self.name, folder) is not None

    def run(self, preparation: Preparation, advance: Callable[[int], None]) -> None:
        """Leaves the shards in the folder."""
        config, items = preparation.config, preparation.items
        filter_settings = None
        if config.filters is not None:
            filter_settings = FilterSettings(config.filters, tuple(item.name for item in items))
        write_part(
            items[self.item],
            preparation.tokenizer,
            preparation.folder,
            config.validation_fraction,
            config.max_bad_record_fraction > 0,
            advance,
            filter_settings,
        )


def finished_part(name: str, folder: Path) -> PartRecord | None:
    """The record of a work item whose shards are all complete, otherwise None."""
    try:
        record = PartRecord.model_validate_json((folder / f"{name}.json").read_bytes())
        for shard in record.shards:
            open_shard(folder / shard.name, shard.documents, shard.tokens)
    except (OSError, ValidationError, DataError):
        return None
    return record


def write_part(
    item: WorkItem,
    tokenizer: Tokenizer,
    folder: Path,
    validation_fraction: float,
    tolerant: bool,
    advance: Callable[[int], None],
    filter_settings: FilterSettings | None = None,
) -> PartRecord:
    """Writes the shards of a work item into `folder`; a split without documents gets none.

    Arguments:
        tolerant: bad records are written to the quarantine file; otherwise the first is an error.
        advance: called with the UTF-8 bytes of the documents processed.
        filter_settings: drop documents by their verdicts, where given.

    Raises DataError for what cannot be read and OSError for what cannot be written.
    """
    corpus = Corpus(item.source, item.pieces)
    writers = {split: _Writer(item, split, folder, tokenizer) for split in _SPLITS}
    bad: list[BadRecord] = []
    verdicts = None if filter_settings is None else VerdictFilter(filter_settings, item, folder)
    try:
        for batch in batches(corpus.documents(bad if tolerant else None)):
            documents = batch if verdicts is None else verdicts.keep(batch)
            ids_of = encode_segments([d.segments or (d.text,) for d in documents], tokenizer)
            for document, ids in zip(documents, ids_of, strict=True):
                validation = is_validation(item.source, document.text, validation_fraction)
                split: Split = "validation" if validation else "train"
                writers[split].add(ids, len(document.text.encode()))
            advance(sum(len(document.text.encode()) for document in batch))
        dropped = {} if verdicts is None else verdicts.stats()
        for writer in writers.values():
            writer.close()
        shards = [shard for writer in writers.values() if (shard := writer.finish()) is not None]
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise
    if bad:
        lines = [json.dumps(record._asdict(), ensure_ascii=False) + "\n" for record in bad]
        # A lone surrogate, of a field's name or a file name that is not UTF-8, becomes an escape.
        content = "".join(lines).encode(errors="backslashreplace")
        write_atomically(folder / f"{item.name}.quarantine.jsonl", content)
    record = PartRecord(
        shards=tuple(shards),
        documents=sum(shard.documents for shard in shards),
        empty=corpus.empty,
        bad=len(bad),
        empty_files=corpus.empty_files,
        dropped=dropped,
    )
    write_atomically(folder / f"{item.name}.json", record.model_dump_json())
    return record


class _Writer:
    """Writes one `.bin/.idx` pair, under temporary names until it is complete."""

    def __init__(self, item: WorkItem, split: Split, folder: Path, tokenizer: Tokenizer):
        module = indexed_module()
        self.source, self.split = item.source, split
        self.prefix = folder / f"{item.source.name}-{split}-{item.number:05d}"
        self.partial = folder / f".{self.prefix.name}.{secrets.token_hex(8)}"
        self.tokenizer = tokenizer
        dtype = module.DType.optimal_dtype(tokenizer.vocab_size)
        self.builder = module.IndexedDatasetBuilder(f"{self.partial}.bin", dtype=dtype)
        self.dtype = dtype
        self.documents = self.tokens = self.bytes = 0

    def add(self, ids: list[NDArray[np.int32]], size: int) -> None:
        """Appends one document of `size` UTF-8 bytes."""
        eos = self.tokenizer.eos_id
        ends = bool(ids) and ids[-1][-1:].tolist() == [eos]  # as conversations do
        end = [] if ends else [[eos]]
        document = np.concatenate(
            [[self.tokenizer.bos_id], *ids, *end], dtype=self.dtype, casting="unsafe"
        )
        self.builder.add_document(document, [len(document)])
        self.documents += 1
        self.tokens += len(document)
        self.bytes += size

    def close(self) -> None:
        """Flushes the tokens."""
        self.builder.data_file.close()

    def discard(self) -> None:
        """Removes the incomplete files; safe to call when writing has failed."""
        with suppress(OSError):  # the disk is full; the file is removed anyway
            self.builder.data_file.close()
        for suffix in (".bin", ".idx"):
            Path(f"{self.partial}{suffix}").unlink(missing_ok=True)

    def finish(self) -> Shard | None:
        """Writes the index, makes both files durable and renames them; None without documents."""
        if not self.documents:
            self.discard()
            return None
        self.builder.finalize(f"{self.partial}.idx")
        for suffix in (".bin", ".idx"):
            fsync_file(Path(f"{self.partial}{suffix}"))
            os.replace(f"{self.partial}{suffix}", f"{self.prefix}{suffix}")
        return Shard(
            source=self.source.name,
            domain=self.source.domain,
            split=self.split,
            name=self.prefix.name,
            documents=self.documents,
            tokens=self.tokens,
            bytes=self.bytes,
        )
