"""What shards are made from: the digest that names them, and files that change meanwhile."""

import hashlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.activity import print_line
from data.config import DataConfig, fingerprint_source, fingerprint_text
from data.errors import DataError
from data.files import sha256_of
from data.prepare.corpus import Corpus
from data.prepare.filters import filter_files
from data.prepare.find_files import SourceFile, stored_now
from data.prepare.readers import SUFFIXES
from data.prepare.work_item import WorkItem
from data.storage import AnyPath, StoragePath
from data.text import Tokenizer

_FORMAT = 2  # raise when equal inputs would give other shards
_CONVERSATIONS = 2  # raise when equal conversations would
_AT_ONCE = 16  # files that a storage is asked about


def digest_of(
    config: DataConfig,
    tokenizer: Tokenizer,
    corpora: Sequence[Corpus],
    items: Sequence[Sequence[WorkItem]],
) -> str:
    """Hex sha256 of everything the shards depend on, the content of local files included.

    Arguments:
        items: the work items of each corpus; where files are divided is part of the digest.

    Logs files that seem to be copies of others.
    """
    tolerant = config.max_bad_record_fraction > 0
    basis = f"{_FORMAT} {tokenizer.hash} {config.validation_fraction} {tolerant}\n"
    if config.filters is not None:
        basis += f"{fingerprint_text(config.filters.fingerprint())}\n"
        for file in filter_files(config.filters):
            basis += f"{_content_of(file)}\n"
    digest = hashlib.sha256(basis.encode())
    for corpus, items_of_corpus in zip(corpora, items, strict=True):
        digest.update(f"{fingerprint_source(corpus.source)}\n".encode())
        if corpus.source.content == "conversation":
            form = f"{_CONVERSATIONS} {corpus.source.effort_field} {corpus.prompts}\n"
            digest.update(form.encode())
        files = corpus.files
        if corpus.source.dataset is not None:  # a copy of one on this machine, or none
            local = sorted(p for p in Path(corpus.source.dataset).glob("**/*") if p.is_file())
            files = list(map(stored_now, local))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            contents = list(pool.map(_content_of, files))
        for file, content in zip(files, contents, strict=True):
            place = f"{file.path} " if isinstance(file.path, StoragePath) else ""
            digest.update(f"{place}{content}\n".encode())
        numbers = {file.path: number for number, file in enumerate(files)}
        pieces = [piece for item in items_of_corpus for piece in item.pieces if not piece.is_whole]
        for piece in pieces:
            digest.update(f"{numbers[piece.path]} {piece.start} {piece.stop}\n".encode())
        _warn_of_copies(corpus.source.name, [file.path for file in files], contents)
    return digest.hexdigest()


def _content_of(file: SourceFile) -> str:
    """What files of equal content have in common; of an object, what its storage says of it."""
    if isinstance(file.path, StoragePath):
        return f"{file.size} {file.version}"
    return sha256_of(file.path)


def _warn_of_copies(source: str, files: list[AnyPath], contents: list[str]) -> None:
    """Logs files whose text is probably there twice: of equal content, or a compressed copy."""
    first: dict[str, AnyPath] = {}
    copies: list[tuple[AnyPath, AnyPath]] = []
    names = set(files)
    for file, content in zip(files, contents, strict=True):
        if (other := first.setdefault(content, file)) != file:
            copies.append((file, other))
        elif (
            file.suffix in SUFFIXES
            and (plain := file.with_name(file.name.removesuffix(file.suffix))) in names
        ):
            copies.append((file, plain))
    if copies:
        file, other = copies[0]
        more = f" (and {len(copies) - 1} more)" if len(copies) > 1 else ""
        print_line(
            f"v4: warning: source {source!r}: {file} seems to be a copy of {other}"
            f"{more}; if it is, its documents are there twice",
            sys.stderr,
        )


def changed_file(files: Sequence[SourceFile]) -> AnyPath | None:
    """A file that is not the one that was found, if there is one."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        changes = pool.map(_is_changed, files)
        return next(
            (file.path for file, is_changed in zip(files, changes, strict=True) if is_changed), None
        )


def _is_changed(file: SourceFile) -> bool:
    try:
        return stored_now(file.path) != file
    except FileNotFoundError:
        return True
    except OSError as error:
        raise DataError(f"cannot read {file.path}: {error.strerror}.") from error
