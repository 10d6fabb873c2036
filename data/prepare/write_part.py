"""The work of one process of `prepare`: tokenises a work item to one part of its source's shards.

`prepare` resumes by work items. The files get their names only when they are complete, and the
record `*.json` is written last: an item with a record is done, any other is processed again.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from data.errors import DataError
from data.files import write_atomically
from data.indexed import open_shard
from data.manifest import SPLITS, FilterStats, Shard, Split
from data.prepare.corpus import BadRecord, Corpus
from data.prepare.filter_pass import FilterSettings, VerdictFilter
from data.prepare.sending import COUNTS, send_part
from data.prepare.shard_writer import ShardWriter
from data.prepare.splits import is_validation
from data.prepare.task import Preparation, Task
from data.prepare.work_item import WorkItem, batches
from data.storage import AnyPath, StoragePath, as_path
from data.text import Tokenizer, encode_segments


class PartRecord(BaseModel):
    """What a finished part holds; `bad` counts the records in the file `*.quarantine.jsonl`.

    `empty` counts documents, `empty_files` files without a record. The shards are in the folder of
    the preparation, or sent to object storage.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    shards: tuple[Shard, ...]
    documents: int
    empty: int
    bad: int
    empty_files: int = 0
    is_sent: bool = False
    dropped: dict[str, FilterStats] = Field(
        default={}, validation_alias=AliasChoices("dropped", "losses")
    )
    masked: FilterStats | None = None


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
            as_path(config.shards),
        )


def finished_part(name: str, folder: Path) -> PartRecord | None:
    """The record of a work item whose shards are all complete, otherwise None."""
    try:
        record = PartRecord.model_validate_json((folder / f"{name}.json").read_bytes())
        if not (folder / f"{name}{COUNTS}").exists():
            return None  # made by an earlier version
        for shard in () if record.is_sent else record.shards:
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
    root: AnyPath | None = None,
) -> PartRecord:
    """Writes the shards of a work item into `folder`; a split without documents gets none.

    Arguments:
        tolerant: bad records are written to the quarantine file; otherwise the first is an error.
        advance: called with the UTF-8 bytes of the documents processed.
        filter_settings: drop documents by their verdicts, where given.
        root: where the shards will be published; they are sent there if it is in object storage.

    Raises DataError for what cannot be read and OSError for what cannot be written.
    """
    corpus = Corpus(item.source, item.pieces)
    writers = {split: ShardWriter(item, split, folder, tokenizer) for split in SPLITS}
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
    with io.BytesIO() as stream:
        np.savez_compressed(
            stream,
            counts=writers["train"].counts,
            train=np.array(writers["train"].lengths, dtype=np.int64),
            validation=np.array(writers["validation"].lengths, dtype=np.int64),
        )
        write_atomically(folder / f"{item.name}{COUNTS}", stream.getvalue())
    record = PartRecord(
        shards=tuple(shards),
        documents=sum(shard.documents for shard in shards),
        empty=corpus.empty,
        bad=len(bad),
        empty_files=corpus.empty_files,
        is_sent=isinstance(root, StoragePath),
        dropped=dropped,
        masked=None if verdicts is None else verdicts.masked,
    )
    text = record.model_dump_json()
    if isinstance(root, StoragePath):
        send_part(root, folder, item.name, shards, text)
    write_atomically(folder / f"{item.name}.json", text)
    return record


def counts_of(name: str, folder: Path, what: Literal["counts"] | Split) -> NDArray[np.int64]:
    """What a finished part leaves until the shards are published.

    `counts`: how often each id is an input in the train split [V]. A split: the tokens of each of
    its documents.
    """
    with np.load(folder / f"{name}{COUNTS}", allow_pickle=False) as arrays:
        array: NDArray[np.int64] = arrays[what]
    return array
