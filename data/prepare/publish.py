"""The folders of shards: which are there, and how new ones replace them."""

import shutil
from pathlib import Path

from data.block_cache import BlockCache
from data.errors import DataError
from data.files import fsync_folder
from data.indexed import open_shard
from data.manifest import MANIFEST_FILE, Manifest
from data.prepare.sending import COUNTS, UNFINISHED, send_rest, target_of
from data.storage import AnyPath, StoragePath
from data.token_counts import read_counts


def existing_shards(
    root: AnyPath, digest: str, overwrite: bool, cache: BlockCache
) -> Manifest | None:
    """The manifest in `root` if it has this digest and its shards are complete, otherwise None.

    Raises DataError, unless `overwrite`, for one with another digest and for one that is damaged.
    """
    if not (root / MANIFEST_FILE).exists():
        names = {path.name for path in _folders(root)}
        complete = sorted(
            name for name in names if name[0] != "." and f"{UNFINISHED}{name}" not in names
        )
        if complete and not overwrite:
            raise DataError(
                f"{root} holds shards in {complete[0]} and no {MANIFEST_FILE}, and runs may "
                "need them; restore it, set another data.shards, or replace them with --overwrite."
            )
        return None
    try:
        manifest = Manifest.load(root)
    except DataError:
        if overwrite:
            return None
        raise
    if manifest.digest != digest:
        if overwrite:
            return None
        if manifest.complete_digest == digest:
            raise DataError(
                f"{root} holds shards without {', '.join(manifest.left_out)}, which failed when "
                "they were made; make them complete with --overwrite, which replaces the shards "
                "that runs were trained on."
            )
        raise DataError(
            f"{root} holds shards of other text, settings or another tokenizer, and runs that were "
            "trained on them need them; set another data.shards, or replace them with --overwrite."
        )
    try:
        for shard in manifest.shards:
            prefix, ends = root / manifest.folder / shard.name, manifest.document_ends
            open_shard(prefix, shard.documents, shard.tokens, ends=ends, cache=cache)
        read_counts(root, manifest)
    except DataError:
        return None  # missing or damaged: made again
    return manifest


def publish(folder: Path, root: AnyPath, manifest: Manifest, keep: Path | None = None) -> None:
    """Gives the finished folder its place, replaces the manifest, and removes earlier folders.

    Arguments:
        keep: not removed, nor what was sent of it.
    """
    target = root / manifest.folder
    if isinstance(target, StoragePath):
        send_rest(target, folder)
    else:
        for counts in folder.glob(f"*{COUNTS}"):
            counts.unlink()
        fsync_folder(folder)
        if target.exists():  # of the same digest, but damaged
            shutil.rmtree(target)
        folder.rename(target)
        fsync_folder(target.parent)
    manifest.save(root)
    kept = {target.name, *(() if keep is None else (keep.name,))}
    if keep is not None and isinstance(root, StoragePath):
        kept.add(target_of(root, keep).name)
    for old in _folders(root):
        if old.name not in kept:
            _remove(old)
    shutil.rmtree(folder, ignore_errors=True)  # of shards in object storage


def _remove(folder: AnyPath) -> None:
    if isinstance(folder, StoragePath):
        folder.remove_tree()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _folders(root: AnyPath) -> list[AnyPath]:
    """The folders made by `prepare`: named by a digest, or left by a run that died."""

    def is_ours(name: str) -> bool:
        hexadecimal = len(name) == 16 and set(name) <= set("0123456789abcdef")
        return name.startswith(UNFINISHED) or hexadecimal

    return [path for path in root.glob("*") if path.is_dir() and is_ours(path.name)]
