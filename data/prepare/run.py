"""Sources to `.bin/.idx` shards, published atomically.

The shards are written into a new folder next to the earlier one, or part by part on the local disk
and sent to object storage (sending.py); then the manifest is replaced, and only then the earlier
folder is removed. A
run that dies leaves the earlier shards and its completed parts: the next run of the same input
resumes with the others. A document is [bos] + text + [eos]. What is written does not depend on the
number of processes.

With filters the input is read twice: first every document is judged and signed (filter_pass.py),
and when all are deduplicated, those that remain are tokenised.
"""

import shutil
from collections.abc import Iterable, Sequence
from functools import partial, reduce
from itertools import chain
from pathlib import Path

from data.activity import Activity
from data.block_cache import BlockCache
from data.config import DataConfig
from data.errors import DataError
from data.indexed import open_cache
from data.lease import Lease
from data.manifest import SPLITS, FilterStats, Manifest, Shard, preparation_settings
from data.prepare.corpus import Corpus, no_document, require_distinct, require_few_bad
from data.prepare.dedup import stages
from data.prepare.digest import changed_file, digest_of
from data.prepare.engines import Engine, open_engine
from data.prepare.filter_pass import FilterTask
from data.prepare.filters import filter_files, require_usable
from data.prepare.find_files import SourceFile
from data.prepare.left_out import incomplete_copy, parts_follow_others, remove_parts, without_items
from data.prepare.publish import existing_shards, publish
from data.prepare.remove import remove_partial_files, remove_work_files
from data.prepare.sending import (
    UNFINISHED,
    SentFiles,
    copy_parts,
    discard,
    restore_records,
)
from data.prepare.tables import add_counts, write_tables
from data.prepare.task import Preparation, Task
from data.prepare.work_item import WorkItem, work_items
from data.prepare.write_part import PartRecord, WritePartTask, finished_part
from data.storage import AnyPath, StoragePath, as_path
from data.text import TURN_TOKENS, Tokenizer
from data.token_counts import write_counts


def prepare(config: DataConfig, progress: bool = True, overwrite: bool = False) -> Manifest:
    """Tokenises every source into `config.shards`; returns the manifest.

    Does nothing where the shards there were made from the same files, with the same settings, by
    the same tokenizer. Other shards are replaced only with `overwrite`: runs that were trained on
    them can be resumed on them alone. `progress` reports progress on stderr. Raises DataError
    where a source or the tokenizer cannot be read, two sources read the same text, there are other
    shards, the disk is full, or another process is writing; the earlier shards stay complete.
    """
    tokenizer = Tokenizer(config.tokenizer.path)
    tokenizer.check_vocab_size(config.tokenizer.vocab_size)
    has_conversations = any(source.content == "conversation" for source in config.sources)
    tokenizer.check_special_tokens(TURN_TOKENS if has_conversations else (), "conversations")
    corpora = [Corpus(source) for source in config.sources]
    require_distinct(corpora)
    inputs = [file for corpus in corpora for file in corpus.files] + filter_files(config.filters)
    items = [work_items(corpus) for corpus in corpora]
    with Activity("hashing the sources", visible=progress):
        digest = digest_of(config, tokenizer, corpora, items)
    root, cache = as_path(config.shards), open_cache(config)
    existing = existing_shards(root, digest, overwrite, cache)
    if existing is not None and _is_current(existing, config):
        return existing
    if config.filters is not None:
        require_usable(config.filters)
    local = _local_folder(config, root, cache)
    folder = local / f"{UNFINISHED}{digest[:16]}"
    try:
        with Lease(root, "v4 data prepare"):
            if (existing := existing_shards(root, digest, overwrite, cache)) is not None:
                # Made in the meantime, from files with other names, or by an earlier version.
                manifest = existing.model_copy(update={"settings": preparation_settings(config)})
                if isinstance(root, Path):
                    manifest = _with_counts(root / existing.folder, manifest)
                manifest.save(root)
                return manifest
            folder.mkdir(parents=True, exist_ok=True)
            try:
                of_all = tuple(chain.from_iterable(items))
                records, left_out = _write(config, of_all, tokenizer, folder, progress)
                _require_unchanged(inputs, folder, root)
                manifest = _manifest(config, digest, tokenizer, records)
                with Activity("adding up the counts of ids", visible=progress):
                    counts = add_counts(records, folder)
                    manifest = manifest.model_copy(update={"token_counts": counts})
                    if not left_out:  # other documents than those of the digest
                        write_tables(records, folder, manifest)
                if isinstance(root, StoragePath):
                    SentFiles(root, folder).require(manifest.shards, manifest.vocab_size)
                manifest = _publish(config, root, folder, manifest, left_out)
            except BaseException:
                if folder.exists() and not any(folder.iterdir()):
                    folder.rmdir()
                raise
    except OSError as error:
        raise DataError(
            f"cannot write the shards into {root}: {error.strerror or error}; "
            "the earlier shards are unchanged."
        ) from error
    return manifest


def _local_folder(config: DataConfig, root: AnyPath, cache: BlockCache) -> Path:
    """The folder in which shards are made."""
    if isinstance(root, Path):
        return root
    tables = cache.tables(root)
    return tables if config.work_folder is None else Path(config.work_folder) / tables.name


def _require_unchanged(files: Sequence[SourceFile], folder: Path, root: AnyPath) -> None:
    """Raises DataError where a file is not the one that was found; its parts are removed."""
    if (file := changed_file(files)) is None:
        return
    shutil.rmtree(folder)
    if isinstance(root, StoragePath):
        discard(root, folder)
    raise DataError(f"{file} changed while it was read; start again once it is complete.")


def _write(
    config: DataConfig,
    items: tuple[WorkItem, ...],
    tokenizer: Tokenizer,
    folder: Path,
    progress: bool,
) -> tuple[list[tuple[WorkItem, PartRecord]], dict[str, str]]:
    """Writes the parts that are not in `folder` yet.

    Returns the work items with their records, and the reason for each that was left out.
    """
    remove_partial_files(folder)
    if isinstance(root := as_path(config.shards), StoragePath):
        restore_records(root, folder, [item.name for item in items])
        _forget_missing(root, folder, items, tokenizer.vocab_size)
    left_out: dict[str, str] = {}
    opened = partial(Preparation, config, folder, open_tokenizer=lambda: tokenizer)
    is_complete = all(part.is_done(folder) for part in _tasks(WritePartTask, items))
    if config.filters is not None and not is_complete:
        with open_engine(opened(items), progress) as engine:
            left_out = engine.run(_tasks(FilterTask, items), "filter")
        items = tuple(item for item in items if item.name not in left_out)
        if parts_follow_others(folder, left_out) and isinstance(root, StoragePath):
            discard(root, folder)
    with open_engine(opened(items), progress) as engine:
        if config.filters is not None and not is_complete:
            _deduplicate(engine, config, items, folder)
        left_out |= engine.run(_tasks(WritePartTask, items), "tokenise")
    remove_partial_files(folder)  # of processes that died
    complete = [item for item in items if item.name not in left_out]
    return [(item, _record(item, folder)) for item in complete], left_out


def _deduplicate(
    engine: Engine, config: DataConfig, items: tuple[WorkItem, ...], folder: Path
) -> None:
    """Leaves verdicts on the documents of all work items."""
    assert config.filters is not None
    for tasks in stages(items, folder, config.filters, config.dedup_memory):
        for name, reason in engine.run(tasks, "deduplicate").items():
            raise DataError(
                f"the deduplication needs each of its tasks, and {name} failed ({reason}); run the "
                "command again, it resumes where it stopped."
            )


def _tasks(kind: type[FilterTask | WritePartTask], items: Sequence[WorkItem]) -> list[Task]:
    """One task of a kind for each work item."""
    return [
        kind(name=item.name, size=item.size, group=item.source.name, item=number)
        for number, item in enumerate(items)
    ]


def _record(item: WorkItem, folder: Path) -> PartRecord:
    record = finished_part(item.name, folder)
    if record is None:
        raise DataError(f"{folder}/{item.name}.json was removed meanwhile; run the command again.")
    return record


def _publish(
    config: DataConfig, root: AnyPath, folder: Path, manifest: Manifest, left_out: dict[str, str]
) -> Manifest:
    """Publishes the parts in `folder`, or those that there are; returns the manifest."""
    if not left_out:
        remove_work_files(folder)
        publish(folder, root, manifest)
        return manifest
    manifest = without_items(manifest, left_out)
    if isinstance(root, StoragePath):
        copy_parts(root, folder, manifest)
    publish(incomplete_copy(folder, manifest), root, manifest, keep=folder)
    if config.filters is not None:  # what is a duplicate depends on the other items
        remove_parts(folder)
        if isinstance(root, StoragePath):
            discard(root, folder)
    return manifest


def _forget_missing(
    root: StoragePath, folder: Path, items: Sequence[WorkItem], vocab_size: int
) -> None:
    """Removes the records of parts whose files are not in object storage: they are made again."""
    sent = SentFiles(root, folder)
    for item in items:
        record = finished_part(item.name, folder)
        if record is not None and sent.missing(record.shards, vocab_size) is not None:
            (folder / f"{item.name}.json").unlink()


def _manifest(
    config: DataConfig, digest: str, tokenizer: Tokenizer, parts: list[tuple[WorkItem, PartRecord]]
) -> Manifest:
    """The manifest of all parts; DataError for a source without documents or with too many bad
    records.
    """
    shards: list[Shard] = []
    empty, bad, empty_files = {}, {}, {}
    dropped: dict[str, dict[str, FilterStats]] = {}
    masked: dict[str, FilterStats] = {}
    for source in config.sources:
        records = [record for item, record in parts if item.source == source]
        of_source = _merge(record.dropped for record in records)
        if config.filters is not None:
            dropped[source.name] = of_source
            of_records = (record.masked for record in records if record.masked is not None)
            if config.filters.pii == "mask":
                masked[source.name] = reduce(FilterStats.plus, of_records, FilterStats())
        kept = sum(record.documents for record in records)
        empty[source.name] = sum(record.empty for record in records)
        bad[source.name] = sum(record.bad for record in records)
        empty_files[source.name] = sum(record.empty_files for record in records)
        total = kept + empty[source.name] + bad[source.name] + _count(of_source)
        listing = (
            f"the records are listed in {config.shards}/{UNFINISHED}{digest[:16]}/"
            "*.quarantine.jsonl"
        )
        require_few_bad(source, bad[source.name], total, config.max_bad_record_fraction, listing)
        if not kept:
            pieces = (piece for item, _ in parts if item.source == source for piece in item.pieces)
            counts = empty[source.name], empty_files[source.name], _count(of_source)
            raise no_document(source, len({piece.path for piece in pieces}), *counts)
        for split in SPLITS:
            shards += [s for record in records for s in record.shards if s.split == split]
    return Manifest(
        digest=digest,
        folder=digest[:16],
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        empty_documents=empty,
        bad_records=bad,
        empty_files=empty_files,
        dropped=dropped,
        masked=masked,
        settings=preparation_settings(config),
        shards=tuple(shards),
    )


def _merge(by_part: Iterable[dict[str, FilterStats]]) -> dict[str, FilterStats]:
    """The sum over the parts of a source, by filter."""
    merged: dict[str, FilterStats] = {}
    for part in by_part:
        for reason, stats in part.items():
            merged[reason] = merged.get(reason, FilterStats()).plus(stats)
    return merged


def _count(dropped: dict[str, FilterStats]) -> int:
    return sum(stats.documents for stats in dropped.values())


def _is_current(manifest: Manifest, config: DataConfig) -> bool:
    """True unless the manifest lacks what this version records, or has other names of files."""
    is_complete = bool(manifest.settings) and manifest.token_counts is not None
    return is_complete and not manifest.stale_setting(config)


def _with_counts(folder: Path, manifest: Manifest) -> Manifest:
    return manifest.model_copy(update={"token_counts": write_counts(folder, manifest)})
