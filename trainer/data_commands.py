"""The verbs of `v4 data` on shards that exist: verify, merge and compare."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from data.activity import Activity

if TYPE_CHECKING:
    from data.storage import AnyPath


def shards_of(text: str, overrides: list[str]) -> AnyPath:
    """Returns the folder of shards that a command line names: itself, or by a config or a run."""
    from data.manifest import MANIFEST_FILE
    from data.storage import StoragePath, as_path
    from trainer.config import ConfigError, load_run

    try:
        place = as_path(text)
    except ValueError as error:
        raise ConfigError(f"command line: the folder {error}") from None
    if isinstance(place, StoragePath) or (place / MANIFEST_FILE).exists():
        return place
    return as_path(load_run(text, overrides).data.shards)


def data_verify(options: argparse.Namespace) -> None:
    """Check the SHA-256 of every file of the token shards."""
    from data import DataError, Manifest
    from data.indexed import shard_cache, token_dtype
    from data.prepare import verify

    root = shards_of(options.shards, options.overrides)
    manifest = Manifest.load(root)
    size = token_dtype(manifest.vocab_size).itemsize
    total = sum(shard.tokens for shard in manifest.shards) * size / 1e6
    with Activity(f"verifying {root}", total, "MB") as activity:
        done = verify(root, manifest, shard_cache(), lambda size: activity.advance(size / 1e6))
    for broken in done.broken:
        print(broken)
    files = 2 * len(manifest.shards)
    if done.without_hashes:
        print(
            f"{done.without_hashes:,} of {len(manifest.shards):,} shards have no hashes in the "
            "manifest: of them sizes and structure were checked, not their tokens"
        )
    if done.broken:
        raise DataError(
            f"{len(done.broken):,} of {files:,} files in {root} are missing or broken; remove "
            "those that are broken and make them again with `v4 data prepare CONFIG`."
        )
    print(
        f"{root}: {done.hashed:,} of {files:,} files have the SHA-256 that they were written with"
    )


def data_merge(options: argparse.Namespace) -> None:
    """Put token shards of several preparations together."""
    from data.documents import by_source
    from data.indexed import shard_cache
    from data.prepare import merge
    from data.storage import as_path
    from trainer.config import ConfigError

    if len(options.shards) < 2:
        raise ConfigError("v4 data merge: name the new folder, then two or more to merge")
    inputs = [shards_of(text, []) for text in options.shards]
    out = as_path(options.out)
    manifest = merge(out, inputs, shard_cache(), options.overwrite)
    train, validation = manifest.tokens("train"), manifest.tokens("validation")
    print(f"{out}: {train:,} tokens for training, {validation:,} for validation")
    print(f"a config of them has data.shards = {out} and the sources, in this order:")
    print(", ".join(by_source(manifest.shards)))
    print("documents of one preparation were not compared with those of another: duplicates stay")
    if manifest.token_counts is None:
        print(
            "one of them has no counts of ids: hash-routed layers take all ids for equally frequent"
        )


def data_compare(options: argparse.Namespace) -> None:
    """Show in compare.html what differs between two preparations."""
    from trainer.report.data_compare import write_comparison

    one = shards_of(options.config, options.overrides)
    with Activity("comparing the shards"):
        path = write_comparison(one, shards_of(options.other, options.overrides))
    print(f"wrote {path}")


def add_data_arguments(parsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the verbs of this module."""
    for name, function in DATA_VERBS.items():
        verb = parsers.add_parser(name, help=function.__doc__)
        if name == "data-verify":
            verb.add_argument("shards")
        if name == "data-merge":
            verb.add_argument("out")
            verb.add_argument("shards", nargs="*")
            verb.add_argument("--overwrite", action="store_true")
        if name == "data-compare":
            verb.add_argument("config")
            verb.add_argument("other")
        if name != "data-merge":
            verb.add_argument("overrides", nargs="*", metavar="key=value")


DATA_VERBS = {"data-verify": data_verify, "data-merge": data_merge, "data-compare": data_compare}
