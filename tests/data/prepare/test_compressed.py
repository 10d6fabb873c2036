"""Compressed text is read to its proper end or refused, in every format."""

import bz2
import gzip
import json
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from data.config import SourceConfig
from data.errors import DataError
from data.prepare.corpus import Corpus

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.compress,
}
TEXTS = [f"document {i} {i * i} {'x' * (i % 50)}" for i in range(2000)]
LINES = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
SKIPPABLE = struct.pack("<II", 0x184D2A53, 3) + b"abc"  # a zstd frame without content, RFC 8878


def texts_in(path: Path, **source: object) -> list[str]:
    settings = {"name": "s", "paths": [str(path)], **source}
    documents = Corpus(SourceConfig.model_validate(settings)).documents([])
    return [document.text for document in documents]


@pytest.fixture(params=COMPRESS)
def suffix(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def frames(suffix: str, parts: int, between: bytes = b"") -> bytes:
    """The lines, compressed in `parts` frames."""
    size = len(LINES) // parts
    texts = [b"".join(LINES[first : first + size]) for first in range(0, len(LINES), size)]
    return between.join(COMPRESS[suffix](text) for text in texts)


def test_all_frames_are_read(tmp_path: Path, suffix: str) -> None:
    padded = frames(suffix, 4, between=bytes(8)) + bytes(512)
    contents = [frames(suffix, 1), frames(suffix, 4), padded, frames(suffix, 1) + bytes(1 << 17)]
    if suffix == "zst":
        contents.append(SKIPPABLE + frames(suffix, 4, between=SKIPPABLE) + SKIPPABLE)
    path = tmp_path / f"a.jsonl.{suffix}"
    for content in contents:
        path.write_bytes(content)
        assert texts_in(path) == TEXTS


def test_a_file_that_is_cut_off_is_refused_wherever_it_is_cut(tmp_path: Path, suffix: str) -> None:
    whole = frames(suffix, 2)
    second = len(COMPRESS[suffix](b"".join(LINES[: len(LINES) // 2])))
    path = tmp_path / f"a.jsonl.{suffix}"
    for size in (0, 3, second // 2, second - 1, second + 1, (second + len(whole)) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix} is cut off: .* frame"):
            texts_in(path)


def test_a_cut_between_lines_is_refused(tmp_path: Path) -> None:
    """Blocks of whole lines: what is left of the file is valid text."""
    writer = zstandard.ZstdCompressor().compressobj()
    half = writer.compress(b"".join(LINES[:100])) + writer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(half)
    with pytest.raises(DataError, match="cut off"):
        texts_in(path)


def test_what_follows_a_frame_has_to_be_a_frame(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    for content in (frames(suffix, 1) + b"garbage", frames(suffix, 2, between=b"X")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{suffix} is damaged in frame 2") as caught:
            texts_in(path)
        assert "\n" not in str(caught.value)


def test_whole_files_of_text_and_datasets_of_the_hub(tmp_path: Path) -> None:
    text = tmp_path / "a.txt.zst"
    text.write_bytes(zstandard.compress(b"one\n") + zstandard.compress(b"two\n"))
    assert texts_in(text, format="text") == ["one\ntwo\n"]
    text.write_bytes(text.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"a\.txt\.zst is cut off"):
        texts_in(text, format="text")

    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "train.jsonl.xz").write_bytes(frames("xz", 2, between=bytes(4)))
    source = SourceConfig(name="s", dataset=str(hub))
    assert [document.text for document in Corpus(source).documents()] == TEXTS
    (hub / "train.jsonl.xz").write_bytes(frames("xz", 2) + b"garbage")
    with pytest.raises(DataError, match="damaged in frame 3"):
        list(Corpus(source).documents())


def test_a_table_without_a_byte_is_no_empty_table(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.parquet is not a parquet table"):
        texts_in(tmp_path / "a.parquet", format="parquet")
