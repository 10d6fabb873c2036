"""Shards of several preparations as one, without making any of them again.

The files are linked, copied within the storage, or copied. What is a duplicate of a document in
another preparation stays: documents are compared only when shards are made.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.activity import Activity
from data.block_cache import BlockCache
from data.documents import by_source, open_tables, table_file
from data.errors import DataError
from data.files import fsync_file
from data.indexed import open_shard
from data.lease import Lease
from data.manifest import SPLITS, Manifest, Shard
from data.prepare.publish import existing_shards, publish
from data.prepare.sending import UNFINISHED, shard_names
from data.storage import AnyPath, StoragePath
from data.token_counts import read_counts, save_counts

_AT_ONCE = 16


def merge(
    out: AnyPath, inputs: Sequence[AnyPath], cache: BlockCache, overwrite: bool = False
) -> Manifest:
    """Writes the shards of all `inputs` into `out`; the inputs stay as they are.

    Raises DataError where two have different tokenizers or a source of the same name, one was not
    made by `v4 data prepare`, or `out` has other shards.
    """
    manifests = [Manifest.load(place) for place in inputs]
    _require_mergeable(out, inputs, manifests)
    manifest = merged_manifest(manifests)
    try:
        with Lease(out, "v4 data merge"):
            if (existing := existing_shards(out, manifest.digest, overwrite, cache)) is not None:
                return existing
            local = cache.tables(out) if isinstance(out, StoragePath) else out
            folder = local / f"{UNFINISHED}{manifest.folder}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            target = out / manifest.folder if isinstance(out, StoragePath) else folder
            for place, one in zip(inputs, manifests, strict=True):
                _bring(place / one.folder, target, shard_names(one))
            manifest = _with_counts(folder, inputs, manifests, manifest)
            _write_tables(folder, inputs, manifests, manifest, cache)
            publish(folder, out, manifest)
    except OSError as error:
        raise DataError(
            f"cannot write the shards into {out}: {error.strerror or error}; "
            "the shards that were to be merged are unchanged."
        ) from error
    return manifest


def _require_mergeable(
    out: AnyPath, inputs: Sequence[AnyPath], manifests: Sequence[Manifest]
) -> None:
    owners: dict[str, AnyPath] = {}
    first = manifests[0]
    for place, manifest in zip(inputs, manifests, strict=True):
        if _is_same(place, out):
            raise DataError(f"{out} is one of the shards to merge; name a new folder for them.")
        ids = (manifest.tokenizer_hash, manifest.vocab_size)
        if ids != (first.tokenizer_hash, first.vocab_size):
            raise DataError(
                f"the shards in {place} were made with another tokenizer than those in "
                f"{inputs[0]}; make them with the same one, nothing was written."
            )
        if manifest.document_ends is None:
            raise DataError(
                f"the shards in {place} are not of `v4 data prepare`, and their documents may not "
                "begin with bos and end with eos; nothing was written."
            )
        for name in by_source(manifest.shards):
            if (other := owners.setdefault(name, place)) is not place:
                raise DataError(
                    f"source {name!r} is in {other} and in {place}; prepare one of them under "
                    "another name, nothing was written."
                )


def _is_same(one: AnyPath, other: AnyPath) -> bool:
    if isinstance(one, Path) and isinstance(other, Path):
        return one.resolve() == other.resolve()
    return str(one) == str(other)


def merged_manifest(manifests: Sequence[Manifest]) -> Manifest:
    """The manifest of all shards; its sources are in the order of the manifests.

    Settings of all sources that the preparations do not share are left out: a config of the merged
    shards may have either value.
    """
    text = " ".join(["merged", *(manifest.digest for manifest in manifests)])
    digest = hashlib.sha256(text.encode()).hexdigest()
    settings: dict[str, Any] = {}
    names: list[str] = []
    for manifest in manifests:
        of_sources = manifest.settings.get("data.sources", list(by_source(manifest.shards)))
        for key, value in manifest.settings.items():
            if key.startswith("data.sources."):
                _, _, number, field = key.split(".", 3)
                settings[f"data.sources.{len(names) + int(number)}.{field}"] = value
        names += of_sources
    common = [manifest.settings for manifest in manifests if manifest.settings]
    for key, value in (common[0] if common else {}).items():
        if not key.startswith("data.sources") and all(s.get(key) == value for s in common):
            settings[key] = value
    settings["data.sources"] = names
    fields = ("empty_documents", "bad_records", "empty_files", "dropped", "masked", "left_out")
    joined: dict[str, dict[str, Any]] = {name: {} for name in fields}
    for name in fields:
        for manifest in manifests:
            joined[name] |= getattr(manifest, name) or {}
    return manifests[0].model_copy(
        update={
            "digest": digest,
            "folder": digest[:16],
            "complete_digest": None,
            "settings": settings,
            "shards": tuple(shard for manifest in manifests for shard in manifest.shards),
            "token_counts": None,
            **joined,
        }
    )


def _bring(source: AnyPath, target: AnyPath, names: list[str]) -> None:
    """Puts files into another folder, without moving their bytes where that is possible."""

    def bring(name: str) -> None:
        one, other = source / name, target / name
        if isinstance(one, StoragePath) and isinstance(other, StoragePath):
            one.copy_to(other)
        elif isinstance(other, StoragePath):
            assert isinstance(one, Path)
            other.upload(one)
        elif isinstance(one, StoragePath):
            one.download(other)
            fsync_file(other)
        else:
            with suppress(OSError):  # of another file system, or one without links
                os.link(one, other)
                return
            shutil.copyfile(one, other)
            fsync_file(other)

    with (
        Activity(f"bringing shards to {target}", len(names), "files") as activity,
        ThreadPoolExecutor(_AT_ONCE) as pool,
    ):
        for _ in pool.map(bring, names):
            activity.advance()


def _with_counts(
    folder: Path, inputs: Sequence[AnyPath], manifests: Sequence[Manifest], manifest: Manifest
) -> Manifest:
    """Writes the counts of all sources; without them where one preparation has none."""
    counts: dict[str, NDArray[np.int64]] = {}
    for place, one in zip(inputs, manifests, strict=True):
        of_sources = read_counts(place, one)
        if of_sources is None:
            return manifest
        counts |= of_sources
    return manifest.model_copy(update={"token_counts": save_counts(folder, counts)})


def _write_tables(
    folder: Path,
    inputs: Sequence[AnyPath],
    manifests: Sequence[Manifest],
    manifest: Manifest,
    cache: BlockCache,
) -> None:
    """Writes the tables of documents, from the indexes."""
    places = {
        shard.name: place / one.folder
        for place, one in zip(inputs, manifests, strict=True)
        for shard in one.shards
    }

    def read_lengths(shard: Shard) -> tuple[np.dtype[Any], NDArray[Any]]:
        prefix = places[shard.name] / shard.name
        opened = open_shard(prefix, shard.documents, shard.tokens, cache=cache)
        return opened.dtype, opened.lengths

    for split in SPLITS:
        if shards := by_source(manifest.of_split(split)):
            open_tables(table_file(folder, split), manifest.digest, shards, read_lengths)
