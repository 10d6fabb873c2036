"""Sources to `.bin/.idx` shards, published in one step.

The shards are written into a folder of their own beside the earlier ones; then the manifest is
replaced, and only then the earlier ones go. A run that dies or meets a full disk leaves what was
there. A document is [bos] + text + [eos]; the tokenizer works on all cores.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig, SourceConfig
from data.corpus import Corpus
from data.errors import DataError
from data.files import fsync_file, fsync_folder, sha256_of
from data.indexed import indexed_module, open_shard
from data.manifest import Manifest, Shard
from data.splits import is_heldout
from data.tokenizer import Tokenizer

_BATCH_CHARACTERS = 4_000_000
_UNFINISHED = ".unfinished-"
_FORMAT = 1  # raise when equal inputs would give other shards


def prepare(config: DataConfig, progress: bool = True) -> Manifest:
    """Tokenise every source into `config.shards`; returns the manifest.

    Does nothing where the shards there were made from the same files by the same tokenizer.
    Raises DataError where a source or the tokenizer cannot be read, or the disk is full; the
    earlier shards stay whole.
    """
    tokenizer = Tokenizer(config.tokenizer.path)
    corpora = [Corpus(source) for source in config.sources]
    digest = _digest(config, tokenizer, corpora)
    root = Path(config.shards)
    done = _already_there(root, digest)
    if done is not None:
        return done
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=root, prefix=_UNFINISHED))
    except OSError as error:
        raise DataError(f"cannot write into {root}: {error.strerror}.") from error
    try:
        shards: list[Shard] = []
        with _Progress(corpora, progress) as bar:
            for corpus in corpora:
                shards += _write_source(config, corpus, tokenizer, folder, bar)
        manifest = Manifest(
            digest=digest,
            folder=digest[:16],
            tokenizer_hash=tokenizer.hash,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            empty_documents={corpus.source.name: corpus.empty for corpus in corpora},
            shards=tuple(shards),
        )
        _publish(folder, root, manifest)
    except OSError as error:
        raise DataError(
            f"cannot write the shards into {root}: {error.strerror or error}; "
            "what was there before is unchanged."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


def _write_source(
    config: DataConfig, corpus: Corpus, tokenizer: Tokenizer, folder: Path, bar: "_Progress"
) -> list[Shard]:
    """Write the shards of one source; a split without documents gets no shard."""
    source = corpus.source
    writers = {split: _Writer(source, split, folder, tokenizer) for split in ("train", "heldout")}
    try:
        for texts in _batches(corpus):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                held = is_heldout(source, text, config.heldout_fraction)
                writers["heldout" if held else "train"].add(ids, len(text.encode()))
            bar.advance(source.name, sum(len(text.encode()) for text in texts))
    finally:
        for writer in writers.values():
            writer.close()
    return [shard for writer in writers.values() if (shard := writer.finish()) is not None]


class _Writer:
    """One `.bin/.idx` pair in the making."""

    def __init__(self, source: SourceConfig, split: Any, folder: Path, tokenizer: Tokenizer):
        module = indexed_module()
        self.source, self.split = source, split
        self.prefix = folder / f"{source.name}-{split}"
        self.tokenizer = tokenizer
        dtype = module.DType.optimal_dtype(tokenizer.vocab_size)
        self.builder = module.IndexedDatasetBuilder(f"{self.prefix}.bin", dtype=dtype)
        self.dtype = dtype
        self.documents = self.tokens = self.bytes = 0

    def add(self, ids: list[int], size: int) -> None:
        """Append one document of `size` UTF-8 bytes."""
        document = np.array([self.tokenizer.bos_id, *ids, self.tokenizer.eos_id], dtype=self.dtype)
        self.builder.add_document(document, [len(document)])
        self.documents += 1
        self.tokens += len(document)
        self.bytes += size

    def close(self) -> None:
        """Flush the tokens; safe to call when writing has failed."""
        self.builder.data_file.close()

    def finish(self) -> Shard | None:
        """Write the index and make both files durable; None (and no files) without documents."""
        binary, index = Path(f"{self.prefix}.bin"), Path(f"{self.prefix}.idx")
        if not self.documents:
            binary.unlink()
            return None
        self.builder.finalize(str(index))
        fsync_file(binary)
        fsync_file(index)
        return Shard(
            source=self.source.name,
            domain=self.source.domain,
            split=self.split,
            name=self.prefix.name,
            documents=self.documents,
            tokens=self.tokens,
            bytes=self.bytes,
        )


def _batches(corpus: Corpus) -> Iterator[list[str]]:
    """Documents gathered to about `_BATCH_CHARACTERS`, for the tokenizer's threads."""
    batch: list[str] = []
    size = 0
    for text in corpus:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _digest(config: DataConfig, tokenizer: Tokenizer, corpora: list[Corpus]) -> str:
    """Hex sha256 of everything the shards depend on; local files enter with their content."""
    digest = hashlib.sha256(f"{_FORMAT} {tokenizer.hash} {config.heldout_fraction}\n".encode())
    for corpus in corpora:
        settings = corpus.source.model_dump_json(exclude={"paths", "include"})
        digest.update(f"{settings}\n".encode())
        for file in corpus.files:
            digest.update(f"{sha256_of(file)}\n".encode())
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
    folder.chmod(0o755)
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


class _Progress:
    """A line per source with the bytes done and the time left; silent where not wanted.

    The total is the size of the files, exact for plain text and an estimate for the other formats.
    """

    def __init__(self, corpora: list[Corpus], visible: bool) -> None:
        from rich import progress
        from rich.console import Console

        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not visible,
        )
        self.tasks = {
            corpus.source.name: self.bar.add_task(
                f"tokenise {corpus.source.name}",
                total=sum(file.stat().st_size for file in corpus.files) or None,
            )
            for corpus in corpora
        }

    def __enter__(self) -> "_Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, source: str, size: int) -> None:
        """Count `size` more bytes of a source."""
        self.bar.update(self.tasks[source], advance=size)
