"""Shards written to object storage: part by part, resumed from what was sent."""

import json
import shutil
from pathlib import Path

import pytest

import data.prepare.work_item
from data.config import DataConfig
from data.errors import DataError
from data.files import sha256_of
from data.indexed import open_cache
from data.manifest import Manifest
from data.prepare import sending, verify
from data.prepare.run import prepare
from data.storage import as_path
from tests.s3 import S3Server


@pytest.fixture
def parts(
    config: DataConfig, tmp_path: Path, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> DataConfig:
    """A source of four files, each of which becomes a part."""
    monkeypatch.setattr(data.prepare.work_item, "_ITEM_BYTES", 1)
    for number in range(4):
        with (tmp_path / f"{number}.jsonl").open("w") as stream:
            for text in documents[-40 * (number + 1) :][:40]:
                stream.write(json.dumps({"text": f"{number} {text}"}) + "\n")
    source = config.sources[0].model_copy(update={"paths": (str(tmp_path / "*.jsonl"),)})
    cache = config.cache.model_copy(update={"folder": str(tmp_path / "cache")})
    update = {"sources": (source,), "cache": cache, "prepare_workers": 1}
    return config.model_copy(update={**update, "shards": str(tmp_path / "shards")})


def test_parts_are_sent_as_they_are_made_and_not_made_again(
    parts: DataConfig, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.set_faults()
    local = prepare(parts, progress=False)
    root = as_path(f"{s3.make_bucket('sending')}/shards")
    remote = parts.model_copy(update={"shards": str(root)})
    (root / "0123456789abcdef" / "x.bin").write(b"of a preparation that was given up")
    (root / ".unfinished-0123456789abcdef" / "x.counts.npz").write(b"")
    on_disk: list[int] = []
    send = sending.send_part

    def send_two(*arguments: object) -> None:
        on_disk.append(len(list(tmp_path.glob("cache/**/*.bin"))))
        if len(on_disk) == 3:
            raise DataError("the machine dies")
        send(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("data.prepare.write_part.send_part", send_two)
    with pytest.raises(DataError, match="the machine dies"):
        prepare(remote, progress=False)
    with pytest.raises(DataError, match=r"no manifest\.json"):
        Manifest.load(root)
    monkeypatch.setattr("data.prepare.write_part.send_part", send)
    shutil.rmtree(tmp_path / "cache")  # and its disk is lost
    before = len(s3.requests())
    manifest = prepare(remote, progress=False)
    assert manifest == local and max(on_disk) <= 2
    bins = [r for r in s3.requests()[before:] if r.startswith("PUT") and ".bin" in r]
    assert len(bins) == sum(s.name.endswith(("2", "3")) for s in manifest.shards)
    assert sorted(root.names()) == [manifest.folder, "manifest.json"]
    for shard in manifest.shards:
        for ending, digest in ((".bin", shard.bin_sha256), (".idx", shard.idx_sha256)):
            name = f"{manifest.folder}/{shard.name}{ending}"
            assert sha256_of(root / name) == sha256_of(Path(parts.shards, name)) == digest
    assert not list(tmp_path.glob("cache/**/*.bin"))


def test_a_part_that_was_removed_is_made_again(
    parts: DataConfig, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.set_faults()
    root = as_path(f"{s3.make_bucket('removed')}/shards")
    remote = parts.model_copy(update={"shards": str(root)})

    def fail(*_: object) -> None:
        raise DataError("the machine dies")

    with monkeypatch.context() as context, pytest.raises(DataError, match="dies"):
        context.setattr("data.prepare.run.add_counts", fail)
        prepare(remote, progress=False)
    (folder,) = (path for path in root.iterdir() if path.name[0] != ".")
    (folder / "text-train-00001.bin").write(b"cut")
    manifest = prepare(remote, progress=False)
    shard = next(s for s in manifest.shards if s.name == "text-train-00001")
    assert sha256_of(folder / "text-train-00001.bin") == shard.bin_sha256


def test_incomplete_shards_are_copies_and_are_completed(
    parts: DataConfig, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.set_faults()
    root = as_path(f"{s3.make_bucket('incomplete')}/shards")
    update = {"shards": str(root), "failed_tasks": "quarantine", "task_attempts": 1}
    remote = parts.model_copy(update=update)
    send = sending.send_part

    def fail_one(*arguments: object) -> None:
        if arguments[2] == "text-00002":
            raise OSError(5, "Input/output error")
        send(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as context:
        context.setattr("data.prepare.write_part.send_part", fail_one)
        manifest = prepare(remote, progress=False)
    assert list(manifest.left_out) == ["text-00002"]
    cache = open_cache(remote)
    assert verify(root, manifest, cache, lambda _: None).broken == []
    before = len(s3.requests())
    complete = prepare(remote, progress=False, overwrite=True)
    puts = [r for r in s3.requests()[before:] if r.startswith("PUT") and ".bin" in r]
    assert {name for name in ("00000", "00001", "00002", "00003") if name in " ".join(puts)} == {
        "00002"
    }
    assert verify(root, complete, cache, lambda _: None).broken == []
    assert sorted(root.names()) == [complete.folder, "manifest.json"]
