"""The token shards of a split, opened for reading."""

import hashlib
from pathlib import Path

from data.config import DataConfig
from data.errors import DataError
from data.files import sha256_of
from data.indexed import IndexedShard, open_cache, open_shard
from data.manifest import Manifest, Split
from data.storage import StoragePath, as_path
from data.text import tokenizer_file


def matching_manifest(config: DataConfig) -> Manifest:
    """The manifest of `config.shards`.

    Raises DataError where another tokenizer, or other settings of the config, made the shards.
    """
    manifest = Manifest.load(config.shards)
    file = tokenizer_file(config.tokenizer.path)
    if sha256_of(file) != manifest.tokenizer_hash:
        raise DataError(
            f"the shards in {config.shards} were made with another tokenizer than {file}; make "
            "shards with this one in another folder (`v4 data prepare CONFIG data.shards=FOLDER "
            f"data.tokenizer.path={config.tokenizer.path}`), or set data.tokenizer.path to theirs."
        )
    if (stale := manifest.stale_setting(config)) is not None:
        key, now, then = stale
        raise DataError(
            f"{key} is {now!r}, and the shards in {config.shards} were made with {then!r}; "
            "restore it, or prepare others with `v4 data prepare CONFIG` in another data.shards."
        )
    return manifest


def content_digest(config: DataConfig, manifest: Manifest) -> str:
    """Identifies the documents of `config.shards`.

    The digest of `v4 data prepare` does. That of another tool's manifest is whatever somebody wrote
    there, so the index files are hashed as well.
    """
    if manifest.document_ends is not None:
        return manifest.digest
    root = as_path(config.shards) / manifest.folder
    parts = [manifest.digest, *(sha256_of(root / f"{s.name}.idx") for s in manifest.shards)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def tables_folder(config: DataConfig, manifest: Manifest) -> Path:
    """Returns the local folder for what is computed from the shards: theirs, or in the cache."""
    root = as_path(config.shards) / manifest.folder
    return open_cache(config).tables(root) if isinstance(root, StoragePath) else root


def open_split(
    config: DataConfig, manifest: Manifest, split: Split, source: str | None
) -> dict[str, tuple[str, list[IndexedShard]]]:
    """The domain and the shards of each source of a split, or of one `source` only.

    Raises DataError where a shard is missing or damaged, or there is none.
    """
    root, cache = as_path(config.shards) / manifest.folder, open_cache(config)
    sources: dict[str, tuple[str, list[IndexedShard]]] = {}
    for shard in manifest.of_split(split):
        if source in (None, shard.source):
            prefix = root / shard.name
            opened = open_shard(
                prefix,
                shard.documents,
                shard.tokens,
                manifest.vocab_size,
                manifest.document_ends,
                cache,
            )
            sources.setdefault(shard.source, (shard.domain, []))[1].append(opened)
    if not sources:
        raise DataError(
            f"the shards in {config.shards} hold no document of the {split} split; "
            "see `validation_fraction` and the sources' `split`."
        )
    return sources
