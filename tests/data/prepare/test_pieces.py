"""Parts of files: what travels to other hosts, and the same documents as of whole files."""

import gzip
import io
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import data.prepare.work_item
from data.config import DataConfig, SourceConfig
from data.errors import DataError
from data.indexed import open_shard
from data.prepare.corpus import BadRecord, Corpus
from data.prepare.pieces import Piece
from data.prepare.readers import divide
from data.prepare.readers.frames import frame_starts
from data.prepare.readers.streams import PieceStream
from data.prepare.run import prepare
from data.prepare.work_item import WorkItem, work_items
from data.storage import as_path
from data.text import Tokenizer

MANY = settings(deadline=None, max_examples=60)


def test_a_work_item_travels_as_json() -> None:
    paths = [as_path("/data/a.jsonl"), as_path("s3://bucket/é.parquet")]
    paths.append(Path(os.fsdecode(b"/data/caf\xe9.txt")))  # not UTF-8, as file systems allow
    pieces = tuple(Piece(path=path, size=9, start=3, stop=5) for path in paths)
    source = SourceConfig(name="s", paths=("/data",))
    item = WorkItem(source=source, number=7, pieces=pieces)
    copy = WorkItem.model_validate_json(item.model_dump_json())
    assert copy == item and hash(copy) == hash(item)
    assert [piece.path for piece in copy.pieces] == paths


def bgzip(content: bytes, block: int, level: int = 6) -> bytes:
    """Blocks as bgzip writes them, and the empty one at the end."""
    blocks = []
    for start in [*range(0, len(content), block), len(content)]:
        part = content[start : start + block]
        packer = zlib.compressobj(level, zlib.DEFLATED, -15)
        body = packer.compress(part) + packer.flush()
        extra = struct.pack("<BBHH", 66, 67, 2, len(body) + 25)
        header = b"\x1f\x8b\x08\x04" + bytes(4) + b"\x00\xff" + struct.pack("<H", 6) + extra
        blocks.append(header + body + struct.pack("<II", zlib.crc32(part), len(part)))
    return b"".join(blocks)


def test_what_looks_like_a_block_of_bgzip_is_none() -> None:
    fake = b"\x1f\x8b\x08\x04" + bytes(6) + b"\x06\x00BC\x02\x00\x09\x00"
    content = b"".join(b"%d " % i + fake + b"\n" for i in range(90))
    packed = bgzip(content, 500, level=0)
    assert packed.count(fake) > 80
    assert divided(packed, "a.txt.gz", len(packed) // 7, format="lines") == 5


def test_frames_by_the_table_at_the_end() -> None:
    """zstd's seekable format, as files in object storage need it."""
    frames = [zstandard.compress(os.urandom(90 + i)) for i in range(9)]
    content = b"".join(frames)
    for checksum in (b"", b"sums"):
        sizes = b"".join(struct.pack("<II", len(frame), 0) + checksum for frame in frames)
        footer = struct.pack("<IBI", len(frames), 0x80 if checksum else 0, 0x8F92EAB1)
        table = struct.pack("<II", 0x184D2A5E, len(sizes + footer)) + sizes + footer
        for end, is_there in ((table, True), (table + b"\0", False), (b"\0" + table, False)):
            stream, size = io.BytesIO(content + end), len(content + end)
            places = [1, 200, 201, 700]
            starts = frame_starts(stream, "zstd", places, size, is_local=False)
            walked = frame_starts(stream, "zstd", places, size)
            assert starts == (walked if is_there else []) and len(walked) == 3


def zstd_frames(content: bytes, block: int) -> bytes:
    """Frames with and without a checksum and a size, an empty one and one to skip among them."""
    frames = []
    for number, start in enumerate(range(0, len(content), block)):
        part = content[start : start + block]
        compressor = zstandard.ZstdCompressor(
            write_checksum=number % 2 == 0, write_content_size=number % 3 == 0
        )
        frames.append(compressor.compress(part))
        if number % 3 == 1:
            frames += [compressor.compress(b""), struct.pack("<II", 0x184D2A53, 3) + b"abc"]
        if number % 4 == 1:
            frames.append(bytes(5))  # zeros that pad
    return b"".join(frames)


def documents(source: SourceConfig, pieces: list[Piece]) -> tuple[list[str], list[str], int]:
    """The texts, the reasons of bad records, and the number of empty documents."""
    bad: list[BadRecord] = []
    texts, empty = [], 0
    for piece in pieces:
        corpus = Corpus(source, [piece])
        texts += [document.text for document in corpus.documents(bad)]
        empty += corpus.empty
    return texts, [record.reason for record in bad], empty


def divided(content: bytes, name: str, part: int, **fields: Any) -> int:
    """Requires the pieces of a file to have the documents of the whole; returns how many it has."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        source = SourceConfig.model_validate({"name": "s", "paths": [str(path)], **fields})
        whole = Piece(path=path, size=len(content))
        pieces = divide(source, whole, max(1, min(part, len(content) // 2)))
        if isinstance(pieces, str):
            return 0
        assert documents(source, pieces) == documents(source, [whole])
        assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
        return len(pieces)


LINE = st.one_of(
    st.text(max_size=40).map(lambda text: json.dumps({"text": text})),
    st.text(max_size=9).map(lambda text: json.dumps({"text": text}, ensure_ascii=False)),
    st.sampled_from(["", " ", "{", '{"text": 1}', '{"text": "a"} {"text": "b"}', "x" * 200]),
).map(lambda line: line.encode(errors="surrogatepass").replace(b"\n", b""))
TEXT = st.tuples(
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.lists(st.tuples(LINE, st.sampled_from([b"\n", b"\r\n", b"\n\n"])), min_size=1),
    st.booleans(),
).map(lambda t: t[0] + b"".join(a + b for a, b in t[1]).removesuffix(b"\n" if t[2] else b"-"))
PACK: dict[str, Callable[[bytes, int], bytes]] = {
    "a.jsonl": lambda content, _: content,
    "a.jsonl.zst": zstd_frames,
    "a.jsonl.gz": bgzip,
}


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("form", ["json", "lines"])
@MANY
@given(content=TEXT, part=st.integers(1, 300), block=st.integers(1, 150))
def test_pieces_have_the_lines_of_the_file(
    name: str, form: str, content: bytes, part: int, block: int
) -> None:
    if content:
        divided(PACK[name](content, block), name, part, format=form)


@pytest.mark.parametrize("name", PACK)
def test_many_pieces(name: str) -> None:
    """The property holds where files are divided indeed, at every size of a piece."""
    lines = [json.dumps({"text": f"{i} " + "y" * (i * 37 % 90)}).encode() for i in range(60)]
    lines[20:20] = [b"z" * 900]
    content = b"\n".join(lines)
    for part in (70, 71, 128, 300, 1500):
        packed = PACK[name](content, 100)
        assert divided(packed, name, part) >= min(len(packed) // part, 3)
    equal = b"".join(b'{"text": "%06d"}\n' % i for i in range(60))  # 19 bytes each
    for block in (38, 57, 19 * 7):  # lines that end where frames do
        packed = PACK[name](equal, block)
        assert divided(packed, name, len(packed) // 6) >= 3
    repeated = GOOD + (b'{"text": "%s"}\n' % (b"a" * 500_000)) * 4 + GOOD * 40
    packed = PACK[name](repeated, 600_000 if "zst" in name else 60_000)
    assert divided(packed, name, len(packed) // 4, format="lines") >= 2  # blocks of zstd's kind RLE


@MANY
@given(
    texts=st.lists(st.text(max_size=30), min_size=2),
    rows=st.integers(1, 5),
    part=st.integers(1, 900),
)
def test_pieces_have_the_rows_of_the_table(texts: list[str], rows: int, part: int) -> None:
    texts = [text.encode(errors="replace").decode() for text in texts]
    stream = io.BytesIO()
    table = pyarrow.table({"n": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, stream, row_group_size=rows)
    divided(stream.getvalue(), "a.parquet", part, format="parquet")


def test_rows_are_numbered_in_the_table(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", "b", "c", None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    path = tmp_path / "a.parquet"
    source = SourceConfig(name="s", paths=(str(path),), format="parquet")
    whole = Piece(path=path, size=path.stat().st_size)
    halves = divide(source, whole, whole.size // 2 - 9)
    assert [(piece.start, piece.stop) for piece in halves] == [(0, 2), (2, 4)]
    pieces = divide(source, whole, 1)
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    with pytest.raises(DataError, match=rf"row 4 of {path} has null"):
        list(Corpus(source, [pieces[3]]).documents())


def items_of(path: Path, size: int, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> list[Any]:
    monkeypatch.setattr(data.prepare.work_item, "_ITEM_BYTES", size)
    source = SourceConfig.model_validate({"name": "s", "paths": [str(path)], **fields})
    return work_items(Corpus(source))


def test_small_files_are_grouped_and_large_ones_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in {"a": 40, "b": 80, "c": 10, "d": 450, "e": 30, "f": 199, "g": 5}.items():
        (tmp_path / f"{name}.txt").write_text("x" * 9 + "\n" + "y" * (size - 10))
    items = items_of(tmp_path, 100, monkeypatch, format="lines")
    names = [[(p.path.stem, p.start, p.stop) for p in item.pieces] for item in items]
    assert names == [
        [("a", 0, None), ("b", 0, None)],
        [("c", 0, None)],
        *([("d", start, stop)] for start, stop in ((0, 112), (112, 225), (225, 337), (337, 450))),
        [("e", 0, None), ("f", 0, None)],
        [("g", 0, None)],
    ]
    assert [item.number for item in items] == list(range(8))


GOOD = b'{"text": "good, and long enough"}\n'
ONE_LINE = json.dumps({"text": "long " * 300}).encode()


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.json", b"[" + b",\n".join([GOOD.strip()] * 40) + b"]", "is JSON that is not one obj"),
        ("a.json", b'\xef\xbb\xbf{\n"text": "a"}\n' * 40, "is JSON that is not one object a line"),
        ("a.jsonl", ONE_LINE, "has a first line of more than 100 bytes"),
        ("a.jsonl.zst", zstandard.compress(os.urandom(300).hex().encode() + b"\n"), "more than"),
        ("a.jsonl.zst", zstandard.compress(GOOD + os.urandom(300).hex().encode()), "of zstd"),
        ("a.jsonl.gz", gzip.compress(GOOD + os.urandom(300).hex().encode()), "one stream of gzip"),
    ],
)
def test_what_cannot_be_divided_is_named_once(
    tmp_path: Path,
    name: str,
    content: bytes,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number in range(3):
        (tmp_path / f"{number}{name}").write_bytes(content)
    items = items_of(tmp_path, 100, monkeypatch)
    assert len(items) == 3 and all(item.pieces[0].is_whole for item in items)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"source 's': {tmp_path}/0{name} (and 2 more) cannot be divided" in line and why in line
    items_of(tmp_path, len(content), monkeypatch)
    assert not capsys.readouterr().err, "nor is it to be, where it is no larger than a work item"


def test_a_long_line_is_read_by_one_piece(tmp_path: Path) -> None:
    """The others stop at their end, so that no file is read many times."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"x" * (40 << 20) + b"\n" + GOOD)
    source = SourceConfig(name="s", paths=(str(path),))
    pieces = [
        Piece(path=path, size=1 << 20, start=start << 20, stop=(start + 1) << 20)
        for start in range(2, 5)
    ]
    for piece in pieces:
        reader = Corpus(source, [piece])
        assert list(reader.documents()) == [] and reader.empty_files == 0
        with PieceStream(piece) as stream:
            assert list(stream.lines()) == []
            assert stream._stream.tell() <= piece.stop + (1 << 20)


def test_places_in_a_divided_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tail -c +BYTE+1 FILE | sed -n LINEp` shows the line."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 9 + b"[1]\n" + GOOD * 9)
    first, second = items_of(path, path.stat().st_size // 2, monkeypatch)
    start = second.pieces[0].start
    bad: list[BadRecord] = []
    for item in (first, second):
        list(Corpus(item.source, item.pieces).documents(bad))
    assert [record.place for record in bad] == [f"line 10 of {path}"]
    path.write_bytes(path.read_bytes()[: start + 50].rjust(start + 50) + b"\n[1]\n")
    second = Piece(path=path, size=9, start=start, stop=path.stat().st_size)
    bad.clear()
    list(Corpus(item.source, [second]).documents(bad))
    after = path.read_bytes()[start:].split(b"\n")
    assert bad[-1].place == f"line {after.index(b'[1]') + 1} after byte {start:,} of {path}"
    assert bad[-1].number == after.index(b"[1]") + 1


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz"])
def test_damage_is_found_by_the_piece_that_has_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(4000))
    content = PACK[name](lines, 500)
    path = tmp_path / name
    path.write_bytes(content)
    items = items_of(path, len(content) // 8, monkeypatch)
    assert len(items) == 8
    whole = [list(Corpus(item.source, item.pieces).documents()) for item in items]
    start, stop = items[3].pieces[0].start, items[3].pieces[0].stop
    middle = (start + stop) // 2
    for damaged in (
        content[:middle] + bytes(30) + content[middle + 30 :],
        content[:middle] + content[middle + 1 :],  # no frame begins where the piece ends
    ):
        path.write_bytes(damaged)
        for number, item in enumerate(items[:4]):
            corpus = Corpus(item.source, item.pieces)
            if number < 3:
                assert list(corpus.documents()) == whole[number]
            else:
                with pytest.raises(DataError, match=rf"{name} is (damaged|cut off).*again\.$"):
                    list(corpus.documents())
    path.write_bytes(PACK[name](lines, 501))  # a good file, but not the one that was divided
    with pytest.raises(DataError, match=r"is damaged(: no frame begins at| in frame 1 after) byte"):
        list(Corpus(items[3].source, items[3].pieces).documents())
    with pytest.raises(DataError, match=rf"is damaged: no frame begins at byte {items[0].size:,} "):
        list(Corpus(items[0].source, items[0].pieces).documents())
    path.write_bytes(content[:-40])
    with pytest.raises(DataError, match=r"is (damaged|cut off)"):
        list(Corpus(items[7].source, items[7].pieces).documents())


def kept_texts(config: DataConfig) -> list[str]:
    manifest = prepare(config, progress=False)
    tokenizer = Tokenizer(config.tokenizer.path)
    return [
        tokenizer.decode(ids[1:-1].tolist())
        for shard in manifest.of_split("train")
        for ids in open_shard(
            Path(config.shards) / manifest.folder / shard.name, shard.documents, shard.tokens
        )
    ]


def test_the_same_documents_are_kept_and_the_digest_differs_only_where_files_are_divided(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"Number {i % 400}: {'words and ' * 9}{i % 400 * 7919}." for i in range(600)]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(b"".join(lines[:300]))
    (tmp_path / "in" / "b.jsonl.zst").write_bytes(zstd_frames(b"".join(lines[300:]), 3000))
    source = {"name": "s", "paths": [str(tmp_path / "in")], "split": "train"}
    filters = {"quality_rules": [], "near_duplicate_similarity": None, "template_similarity": None}
    fields = {"sources": [source], "filters": filters, "prepare_workers": 1}

    def kept(name: str) -> list[str]:
        shards = {"shards": str(tmp_path / name)}
        return kept_texts(DataConfig.model_validate(config.model_dump() | fields | shards))

    whole = kept("whole")
    digest = (tmp_path / "whole" / "manifest.json").read_text().split('"digest": "')[1][:64]
    monkeypatch.setattr(data.prepare.work_item, "_ITEM_BYTES", 64 << 19)
    assert kept("same") == whole
    assert digest in (tmp_path / "same" / "manifest.json").read_text()
    monkeypatch.setattr(data.prepare.work_item, "_ITEM_BYTES", 1500)
    assert kept("divided") == whole and len(whole) == 400
    manifest = (tmp_path / "divided" / "manifest.json").read_text()
    assert "s-train-00010" in manifest and digest not in manifest
