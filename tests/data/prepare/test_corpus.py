"""Reading raw text: the documents, and the error for each kind of bad input."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from pydantic import ValidationError

from data.config import SourceConfig
from data.errors import DataError
from data.prepare.corpus import BadRecord, Corpus, first_invalid_utf8

TEXTS = ["one \x00 two\r\n", "▁ three\u2028", "four"]


def corpus(**fields: Any) -> Corpus:
    return Corpus(SourceConfig.model_validate({"name": "s", **fields}))


def texts_of(source: Corpus) -> list[str]:
    return [document.text for document in source]


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: text}) + "\n" for text in texts).encode()


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the library would cache tables if it did not stream."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder))
    return folder


def test_every_json_container(tmp_path: Path, cache: Path) -> None:
    contents = {
        "a.jsonl": jsonl(TEXTS),
        "b.jsonl.gz": gzip.compress(jsonl(TEXTS)),
        "c.jsonl.zst": zstandard.compress(jsonl(TEXTS)),
        "d.json": json.dumps([{"text": text} for text in TEXTS]).encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert texts_of(corpus(paths=[str(tmp_path / name)])) == TEXTS, name
    assert texts_of(corpus(paths=[str(tmp_path)])) == TEXTS * 4
    assert texts_of(corpus(paths=[str(tmp_path / "*.jsonl*")])) == TEXTS * 3
    assert not list(cache.rglob("*.arrow"))


def test_parquet(tmp_path: Path) -> None:
    table = pyarrow.table({"body": TEXTS, "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = corpus(paths=[str(tmp_path / "a.parquet")], format="parquet", text_field="body")
    assert texts_of(source) == TEXTS


def test_tree_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "odd [name]"
    folder.mkdir()
    (folder / "b[1].py").write_text("b\n\n")
    (folder / "a.py").write_text("a\n")
    (folder / "empty.py").write_text("")
    (folder / "blank.py").write_text(" \n")
    (folder / "note.txt").write_text("not included")
    source = corpus(paths=[str(tmp_path)], include=["**/*.py"], format="text")
    assert texts_of(source) == ["a\n", "b\n\n"]
    assert source.empty == 2
    assert texts_of(source) == ["a\n", "b\n\n"] and source.empty == 2


def test_a_dataset_of_the_hub(tmp_path: Path, cache: Path) -> None:
    """A folder stands in for it; the library opens both in the same way."""
    hub = tmp_path / "hub"
    hub.mkdir()
    for name in ("train", "test", "other"):
        (hub / f"{name}.jsonl").write_bytes(jsonl([*TEXTS, name], "body"))
    subsets = {
        "main": [{"split": s, "path": f"{s}.jsonl"} for s in ("train", "test")],
        "small": [{"split": "train", "path": "other.jsonl"}],
    }
    configs = [{"config_name": name, "data_files": files} for name, files in subsets.items()]
    (hub / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    for subset, split, last in (
        ("main", "train", "train"),
        ("main", "test", "test"),
        ("small", "train", "other"),
    ):
        fields = {"dataset_subset": subset, "dataset_split": split, "text_field": "body"}
        assert texts_of(corpus(dataset=str(hub), **fields)) == [*TEXTS, last]
    with pytest.raises(DataError, match=r"source 's': cannot open the dataset .*hub.*dev") as error:
        texts_of(corpus(dataset=str(hub), dataset_subset="main", dataset_split="dev"))
    assert "\n" not in str(error.value)
    assert not list(cache.rglob("*.arrow"))


def test_files_that_are_not_utf8_are_quarantined(tmp_path: Path) -> None:
    for name, content in (("a.txt", b"a\n"), ("b.txt", b"caf\xe9"), ("c.txt", b"c\n")):
        (tmp_path / name).write_bytes(content)
    bad: list[BadRecord] = []
    documents = corpus(paths=[str(tmp_path)], format="text").documents(bad)
    assert [document.text for document in documents] == ["a\n", "c\n"]
    assert bad == [BadRecord(str(tmp_path / "b.txt"), 1, "is not UTF-8 at byte 3")]


def test_empty_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x", "", " \n", "y"]))
    source = corpus(paths=[str(tmp_path / "a.jsonl")])
    assert texts_of(source) == ["x", "y"] and source.empty == 2


@pytest.mark.parametrize("form", ["json", "text"])
def test_not_utf8_names_file_and_offset(tmp_path: Path, form: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["fine"]))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl is not UTF-8: the byte at offset 13"):
        texts_of(corpus(paths=[str(tmp_path)], format=form))


def test_invalid_utf8_across_blocks(tmp_path: Path) -> None:
    block = 1 << 20
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * (block - 1) + "é".encode() + b"y")
    assert first_invalid_utf8(path) is None
    path.write_bytes(b"x" * (block - 1) + b"\xc3x")
    assert first_invalid_utf8(path) == block - 1
    path.write_bytes(b"x\xc3")
    assert first_invalid_utf8(path) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"body": "x"}\n', "record 1 .* no string in the field 'text'; its fields are body"),
        (b'{"text": "x"}\n{"text": null}\n', "record 2 .* no string in the field 'text'"),
        (b'{"text": "x"\n', "cannot read record 1 of .*a.jsonl"),
        (b"", "source 's' holds no document"),
        (b'{"text": ""}\n', "source 's' holds no document: 1 files, 1 empty documents"),
    ],
)
def test_bad_content_is_one_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        texts_of(corpus(paths=[str(tmp_path / "a.jsonl")]))
    assert "\n" not in str(caught.value)


def test_text_that_cannot_be_used_names_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("five!")
    monkeypatch.setattr("data.prepare.corpus._MAX_CHARACTERS", 4)
    with pytest.raises(DataError, match=r"^record 0 of the files of source 's' has 5 characters"):
        texts_of(corpus(paths=[str(tmp_path)], format="text"))


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source 's': nothing to read at .*nowhere"):
        corpus(paths=[str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match="an empty folder"):
        corpus(paths=[str(tmp_path)])


@pytest.mark.parametrize("fields", [{}, {"paths": ["x"], "dataset": "y"}])
def test_one_origin(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="either `paths` or `dataset`"):
        SourceConfig.model_validate({"name": "s", **fields})
