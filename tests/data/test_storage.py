"""URLs, paths in object storage, retries, and the cache of blocks."""

from pathlib import Path

import numpy as np
import pytest

from data.block_cache import BLOCK_BYTES, BlockCache
from data.errors import DataError
from data.storage import StoragePath, as_path, check_url, is_url, retries
from data.storage.retries import with_retries
from tests.s3 import S3Server


@pytest.mark.parametrize(
    ("text", "checked"),
    [
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("S3://Bucket/A", "s3://Bucket/A"),
        ("file:///data/x", "/data/x"),
        ("runs/one", "runs/one"),
        ("/runs/a@b?c", "/runs/a@b?c"),
    ],
)
def test_urls_and_paths(text: str, checked: str) -> None:
    assert check_url(text) == checked
    assert (
        isinstance(as_path(text), StoragePath) == is_url(text) == checked.lower().startswith("s3")
    )


@pytest.mark.parametrize(
    "text", ["s3://me:secret@b/x", "s3://secret@b", "s3://b/x?secret=1", "simplecache::s3://secret"]
)
def test_a_refused_url_is_not_shown(text: str) -> None:
    with pytest.raises(ValueError) as refused:
        check_url(text)
    assert "secret" not in str(refused.value)


def test_growing_waits_then_a_sentence_without_a_user(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", waits.append)

    def fail() -> None:
        raise ConnectionError("cannot reach http://me:secret@host/")

    with pytest.raises(OSError, match="cannot reach http://host/") as failed:
        with_retries(fail, "s3://bucket/x")
    assert failed.value.filename == "s3://bucket/x"
    assert len(waits) == len(retries.DELAYS)
    assert all(
        0.5 * mean <= wait <= 1.5 * mean for wait, mean in zip(waits, retries.DELAYS, strict=True)
    )
    assert "secret" not in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        StoragePath("memory://nowhere/x").read_bytes()
    assert len(waits) == len(retries.DELAYS), "what is not there is not asked for again"


def test_blocks_are_fetched_once_and_the_oldest_go(s3: S3Server, tmp_path: Path) -> None:
    s3.set_faults()
    content = np.random.default_rng(0).bytes(5 * BLOCK_BYTES + 100)
    path = StoragePath(f"{s3.make_bucket('blocks')}/tokens.bin")
    path.write(content)
    cache = BlockCache(tmp_path, 3 * BLOCK_BYTES + BLOCK_BYTES // 2)
    file = cache.open(path)
    for start, size in ((10, 20), (BLOCK_BYTES - 5, 10), (5 * BLOCK_BYTES + 90, 50), (0, 0)):
        assert file.read(start, size) == content[start : start + size]
    before = len(s3.requests())
    assert file.read(0, 2 * BLOCK_BYTES) == content[: 2 * BLOCK_BYTES]
    assert BlockCache(tmp_path, 10**9).open(path).read(7, 7) == content[7:14]
    assert len(s3.requests()) == before + 1, "another process finds the blocks, and asks for a size"
    assert file.read(0, len(content)) == content
    blocks = [one for one in tmp_path.rglob("*") if one.is_file()]
    assert sum(one.stat().st_size for one in blocks) <= cache.max_bytes
    blocks[0].write_bytes(b"short")
    assert file.read(0, len(content)) == content
    path.write(bytes(reversed(content)))
    assert cache.open(path).read(0, 9) == content[:-10:-1], "another object of the same size"


def test_a_cache_that_cannot_be_written_is_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = StoragePath("memory://cached/tokens.bin")
    path.write(b"ab" * BLOCK_BYTES)
    (tmp_path / "file").write_text("")
    file = BlockCache(tmp_path / "file", 10**9).open(path)
    assert file.read(0, 4) == b"abab" and file.read(BLOCK_BYTES, 4) == b"abab"
    assert capsys.readouterr().err.count("shards are read without a cache") == 1


def test_an_object_that_is_there_is_not_created_again(s3: S3Server) -> None:
    s3.set_faults()
    path = StoragePath(f"{s3.make_bucket('creations')}/one")
    path.write("first", exclusive=True)
    with pytest.raises(FileExistsError):
        path.write("second", exclusive=True)
    assert path.read_text() == "first"


def test_a_missing_driver_is_named() -> None:
    with pytest.raises(DataError, match=r"pip install 'v4-pretrain\[gcs\]'"):
        StoragePath("gs://bucket/x").read_bytes()
