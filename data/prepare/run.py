"""Sources to `.bin/.idx` shards, published in one step.

The shards are written into a folder of their own beside the earlier ones; then the manifest is
replaced, and only then the earlier ones go. A run that dies leaves what was there, and the parts
that were whole: the next run of the same input goes on with the others. A document is
[bos] + text + [eos]. What is written does not depend on the number of processes.

With filters the input is read twice: first every document is judged and signed (data.screening),
and when all are, those that stay are tokenised.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from data.config import DataConfig, FiltersConfig, fingerprint_text
from data.errors import DataError
from data.files import fsync_folder, sha256_of
from data.indexed import open_shard
from data.manifest import Loss, Manifest, Shard
from data.prepare.corpus import Corpus, no_document
from data.prepare.pool import Progress, run_units
from data.prepare.screening import decide, is_screened, remove_screening, screen_unit
from data.prepare.work_item import Unit, units_of
from data.prepare.write_part import UnitRecord, finished, run_unit
from data.sieve import Filtered
from data.text import Tokenizer

_UNFINISHED = ".unfinished-"
_FORMAT = 2  # raise when equal inputs would give other shards


def prepare(config: DataConfig, progress: bool = True) -> Manifest:
    """Tokenise every source into `config.shards`; returns the manifest.

    Does nothing where the shards there were made from the same files by the same tokenizer.
    Raises DataError where a source or the tokenizer cannot be read, the disk is full, or another
    process is at it; the earlier shards stay whole.
    """
    tokenizer = Tokenizer(config.tokenizer.path)
    corpora = [Corpus(source) for source in config.sources]
    digest = _digest(config, tokenizer, corpora)
    root = Path(config.shards)
    done = _already_there(root, digest)
    if done is not None:
        return done
    folder = root / f"{_UNFINISHED}{digest[:16]}"
    try:
        with _locked(root):
            folder.mkdir(exist_ok=True)
            try:
                records = _write(config, corpora, tokenizer, folder, progress)
                manifest = _manifest(config, digest, tokenizer, records)
                remove_screening(folder)
                _publish(folder, root, manifest)
            except BaseException:
                if folder.exists() and not any(folder.iterdir()):
                    folder.rmdir()
                raise
    except OSError as error:
        raise DataError(
            f"cannot write the shards into {root}: {error.strerror or error}; "
            "what was there before is unchanged."
        ) from error
    return manifest


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Keep other runs out of `root`; the lock goes with the process."""
    root.mkdir(parents=True, exist_ok=True)
    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise DataError(f"another `v4 data prepare` is writing into {root}.") from error
    finally:
        os.close(handle)


def _write(
    config: DataConfig, corpora: list[Corpus], tokenizer: Tokenizer, folder: Path, progress: bool
) -> list[tuple[Unit, UnitRecord]]:
    """Make the parts that are not in `folder` yet; all units with their records, in order."""
    units = [unit for corpus in corpora for unit in units_of(corpus)]
    for left in folder.glob(".*"):
        left.unlink()  # of a run that died while it wrote
    records = {unit: record for unit in units if (record := finished(unit, folder)) is not None}
    rest = [unit for unit in units if unit not in records]
    tolerant = config.max_bad_record_fraction > 0
    workers = config.prepare_workers or os.cpu_count() or 1
    filtered = None
    if config.filters is not None and rest:
        _screen(config.filters, units, tokenizer, folder, tolerant, workers, progress)
        filtered = Filtered(config.filters, tuple(unit.name for unit in units))
    work = partial(
        run_unit,
        folder=folder,
        validation_fraction=config.validation_fraction,
        tolerant=tolerant,
        filtered=filtered,
    )
    with Progress(units, "tokenise", progress) as bar:
        for unit in records:
            bar.advance(unit, unit.size)
        records.update(run_units(rest, tokenizer, workers, work, bar.advance))
    return [(unit, records[unit]) for unit in units]


def _screen(
    filters: FiltersConfig,
    units: list[Unit],
    tokenizer: Tokenizer,
    folder: Path,
    tolerant: bool,
    workers: int,
    progress: bool,
) -> None:
    """Leave verdicts on all documents in `folder`."""
    work = partial(screen_unit, folder=folder, filters=filters, tolerant=tolerant)
    with Progress(units, "screen", progress) as bar:
        rest = []
        for unit in units:
            if is_screened(unit, folder):
                bar.advance(unit, unit.size)
            else:
                rest.append(unit)
        for _ in run_units(rest, tokenizer, workers, work, bar.advance):
            pass
    decide(units, folder, filters)


def _manifest(
    config: DataConfig, digest: str, tokenizer: Tokenizer, parts: list[tuple[Unit, UnitRecord]]
) -> Manifest:
    """The manifest of all parts; DataError for a source that is empty or has too many bad ones."""
    shards: list[Shard] = []
    empty, bad = {}, {}
    losses: dict[str, dict[str, Loss]] = {}
    for source in config.sources:
        mine = [(unit, record) for unit, record in parts if unit.source == source]
        records = [record for _, record in mine]
        lost: dict[str, Loss] = {}
        for record in records:
            for reason, loss in record.losses.items():
                lost[reason] = lost.get(reason, Loss()).plus(loss)
        if config.filters is not None:
            losses[source.name] = lost
        found = sum(record.documents for record in records)
        empty[source.name] = sum(record.empty for record in records)
        bad[source.name] = sum(record.bad for record in records)
        share = bad[source.name] / max(
            1, found + empty[source.name] + bad[source.name] + _total(lost)
        )
        if share > config.max_bad_record_fraction:
            raise DataError(
                f"source {source.name!r} has {bad[source.name]} bad records, a share of "
                f"{share:.3g}; `max_bad_record_fraction` allows {config.max_bad_record_fraction:g} (the records "
                f"are listed in {config.shards}/{_UNFINISHED}{digest[:16]}/*.quarantine.jsonl)."
            )
        if not found:
            files = sum(len(unit.files) for unit, _ in mine)
            raise no_document(source, files, empty[source.name], _total(lost))
        for split in ("train", "validation"):
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
        losses=losses,
        shards=tuple(shards),
    )


def _total(losses: dict[str, Loss]) -> int:
    return sum(loss.documents for loss in losses.values())


def _digest(config: DataConfig, tokenizer: Tokenizer, corpora: list[Corpus]) -> str:
    """Hex sha256 of everything the shards depend on; local files enter with their content."""
    tolerant = config.max_bad_record_fraction > 0
    basis = f"{_FORMAT} {tokenizer.hash} {config.validation_fraction} {tolerant}\n"
    if config.filters is not None:
        basis += f"{fingerprint_text(config.filters.model_dump_json())}\n"
    digest = hashlib.sha256(basis.encode())
    for corpus in corpora:
        settings = fingerprint_text(corpus.source.model_dump_json(exclude={"paths", "include"}))
        digest.update(f"{settings}\n".encode())
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for content in pool.map(sha256_of, corpus.files):
                digest.update(f"{content}\n".encode())
    return digest.hexdigest()


def _already_there(root: Path, digest: str) -> Manifest | None:
    """The manifest, where it is of this digest and its shards are whole."""
    try:
        manifest = Manifest.load(root)
        if manifest.digest != digest:
            return None
        for shard in manifest.shards:
            open_shard(root / manifest.folder / shard.name, shard.documents, shard.tokens)
    except DataError:
        return None  # nothing there, or damaged: made anew
    return manifest


def _publish(folder: Path, root: Path, manifest: Manifest) -> None:
    """Move the finished folder to its name, replace the manifest, drop what it replaces."""
    fsync_folder(folder)
    target = root / manifest.folder
    if target.exists():  # of the same digest, but found damaged
        shutil.rmtree(target)
    folder.rename(target)
    fsync_folder(root)
    manifest.save(root)
    for old in root.iterdir():
        if old.is_dir() and old != target and _is_ours(old):
            shutil.rmtree(old, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    """True for folders that `prepare` made: a digest's beginning, or left by a run that died."""
    hexadecimal = len(folder.name) == 16 and set(folder.name) <= set("0123456789abcdef")
    return folder.name.startswith(_UNFINISHED) or hexadecimal
