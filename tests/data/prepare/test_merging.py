"""`merge` and `verify`: shards put together as they are, and what is broken in them named."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.block_cache import BlockCache
from data.config import DataConfig
from data.errors import DataError
from data.manifest import FilterStats, Manifest
from data.prepare import merge, verify
from data.prepare.merging import merged_manifest
from data.prepare.run import prepare
from data.rows.loader import Loader
from data.storage import as_path
from data.token_counts import read_counts
from tests.s3 import S3Server


@pytest.fixture
def cache(tmp_path: Path) -> BlockCache:
    return BlockCache(tmp_path / "cache", 10**9)


@pytest.fixture
def pair(config: DataConfig, tmp_path: Path) -> list[DataConfig]:
    """Two preparations, `one` and `two`, each of a source of its name."""
    return [prepared(config, tmp_path, name) for name in ("one", "two")]


def prepared(config: DataConfig, folder: Path, name: str) -> DataConfig:
    (folder / f"{name}.jsonl").write_text(
        "".join(json.dumps({"text": f"{name} {i} " * (i % 9 + 3)}) + "\n" for i in range(60))
    )
    source = {"name": name, "paths": [str(folder / f"{name}.jsonl")]}
    fields = {"sources": [source], "shards": str(folder / f"shards-{name}")}
    made = DataConfig.model_validate(config.model_dump() | fields)
    prepare(made, progress=False)
    return made


def together(pair: list[DataConfig], shards: str) -> DataConfig:
    sources = [config.model_dump()["sources"][0] for config in pair]
    return DataConfig.model_validate(pair[0].model_dump() | {"sources": sources, "shards": shards})


def rows(config: DataConfig) -> list[bytes]:
    loader = Loader(config, 0)
    return [b.tokens.numpy().tobytes() for s in range(loader.num_steps) for b in loader.at(s)]


def test_what_was_skipped_and_masked_is_kept(pair: list[DataConfig]) -> None:
    stats, manifests = FilterStats(documents=3, bytes=9), []
    for config in pair:
        name = config.sources[0].name
        by_source = {"masked": {name: stats}, "dropped": {name: {"near": stats}}}
        by_source |= {"bad_records": {name: 1}, "left_out": {f"{name}-00001": "no memory"}}
        manifests.append(Manifest.load(config.shards).model_copy(update=by_source))
    merged = merged_manifest(manifests)
    for field in ("masked", "dropped", "bad_records", "left_out", "empty_documents", "empty_files"):
        one, two = (getattr(manifest, field) for manifest in manifests)
        assert getattr(merged, field) == {**one, **two} and len(one) == len(two) == 1


def test_merged_shards_are_read_like_those_of_one_preparation(
    pair: list[DataConfig], tmp_path: Path, cache: BlockCache
) -> None:
    inputs = [as_path(config.shards) for config in pair]
    before = [rows(config) for config in pair]
    manifest = merge(tmp_path / "merged", inputs, cache)
    merged = together(pair, str(tmp_path / "merged"))
    at_once = together(pair, str(tmp_path / "at-once"))
    expected = prepare(at_once, progress=False)
    assert rows(merged) == rows(at_once)
    assert manifest.shards == expected.shards and manifest.settings == expected.settings
    counts, others = read_counts(merged.shards, manifest), read_counts(at_once.shards, expected)
    assert counts is not None and others is not None
    assert counts.keys() == others.keys() == {"one", "two"}
    assert all(np.array_equal(counts[name], others[name]) for name in counts)
    assert [rows(config) for config in pair] == before
    name = f"{manifest.shards[0].name}.bin"
    original = Path(pair[0].shards) / Manifest.load(pair[0].shards).folder / name
    assert os.path.samefile(tmp_path / "merged" / manifest.folder / name, original)
    assert merge(tmp_path / "merged", inputs, cache) == manifest
    swapped = together(pair[::-1], merged.shards)
    with pytest.raises(DataError, match=r"data\.sources is \['two', 'one'\]"):
        Loader(swapped, 0)
    with pytest.raises(DataError, match="holds shards of other text"):
        merge(tmp_path / "merged", inputs[::-1], cache)


def test_in_object_storage_no_bytes_are_moved(
    pair: list[DataConfig], tmp_path: Path, cache: BlockCache, s3: S3Server
) -> None:
    s3.set_faults()
    bucket = as_path(s3.make_bucket("merging"))
    fields = {"folder": str(tmp_path / "cache")}
    remote = []
    for config in pair:
        shards = str(bucket / config.sources[0].name)
        made = DataConfig.model_validate(config.model_dump() | {"shards": shards, "cache": fields})
        prepare(made, progress=False)
        remote.append(made)
    before = len(s3.requests())
    manifest = merge(bucket / "merged", [as_path(c.shards) for c in remote], cache)
    requests = s3.requests()[before:]
    assert not [request for request in requests if request.startswith("GET") and ".bin" in request]
    assert rows(together(remote, str(bucket / "merged"))) == rows(
        together(pair, str(merged_here(pair, tmp_path, cache)))
    )
    assert verify(bucket / "merged", manifest, cache, lambda _: None).broken == []


def merged_here(pair: list[DataConfig], folder: Path, cache: BlockCache) -> Path:
    merge(folder / "here", [as_path(config.shards) for config in pair], cache)
    return folder / "here"


def test_what_cannot_be_merged_is_one_sentence(
    pair: list[DataConfig], tmp_path: Path, cache: BlockCache
) -> None:
    one, two = (as_path(config.shards) for config in pair)
    with pytest.raises(DataError, match=r"source 'one' is in .*nothing was written"):
        shutil.copytree(one, tmp_path / "copy")
        merge(tmp_path / "out", [one, tmp_path / "copy"], cache)
    (tmp_path / "link").symlink_to(one)
    for out in (one, tmp_path / "link"):
        with pytest.raises(DataError, match="is one of the shards to merge"):
            merge(out, [one, two], cache, overwrite=True)
    manifest = Manifest.load(two)
    manifest.model_copy(update={"tokenizer_hash": "other"}).save(two)
    with pytest.raises(DataError, match=r"another tokenizer than those in .*nothing was written"):
        merge(tmp_path / "out", [one, two], cache)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["bit", "cut", "missing", "counts", "none"])
@pytest.mark.parametrize("with_hashes", [True, False])
def test_broken_files_are_named(
    pair: list[DataConfig], cache: BlockCache, damage: str, with_hashes: bool
) -> None:
    root = Path(pair[0].shards)
    manifest = Manifest.load(root)
    if not with_hashes:
        none = {"bin_sha256": None, "idx_sha256": None}
        shards = tuple(shard.model_copy(update=none) for shard in manifest.shards)
        manifest = manifest.model_copy(update={"shards": shards})
    name = "token_counts.npz" if damage == "counts" else "one-train-00000.bin"
    file = root / manifest.folder / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage in ("bit", "counts"):
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-2])
    elif damage == "missing":
        file.unlink()
    sizes: list[float] = []
    done = verify(root, manifest, cache, sizes.append)
    assert done.hashed == (2 * len(manifest.shards) if with_hashes else 0)
    assert done.without_hashes == (0 if with_hashes else len(manifest.shards))
    found = [str(broken) for broken in done.broken]
    if damage == "none" or (damage == "bit" and not with_hashes):
        assert found == []
        return
    assert (len(found) == 1 and "one-train-00000" in found[0]) or "token_counts" in found[0]
    assert damage == "counts" or "source 'one', train" in found[0]
