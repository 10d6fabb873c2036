"""Reading raw text: the documents, and the error for each kind of bad input."""

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from pydantic import ValidationError

from data.config import SourceConfig
from data.errors import DataError
from data.prepare.corpus import BadRecord, Corpus, require_distinct

TEXTS = ["one \x00 two\r\n", "▁ three\u2028", "four"]


def corpus(**fields: Any) -> Corpus:
    return Corpus(SourceConfig.model_validate({"name": "s", **fields}))


def texts_of(source: Corpus) -> list[str]:
    return [document.text for document in source]


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: text}) + "\n" for text in texts).encode()


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


RECORD = {"a": {"b": "inner", "c": {"d": "deep"}}, "a.c": {"d": "half"}, "x.y": "literal", "n": 1}


@pytest.mark.parametrize("form", ["json", "parquet"])
@pytest.mark.parametrize(
    ("field", "result"),
    [
        ("a.b", "inner"),
        ("a.c.d", "deep"),
        ("x.y", "literal"),
        ("a.z", "no field 'z'; its fields are b, c (set `text_field` of source 's')"),
        ("a.c.z", "in 'a' in 'c' no field 'z'; its fields are d (set"),
        ("q.z", "no field 'q' with 'z' in it; its fields are a, a.c, n, x.y (set"),
        ("a.b.z", "in 'a' a string instead of an object in the field 'b' (set"),
        ("a", "an object instead of a string in the field 'a'"),
    ],
)
def test_fields_inside_fields(tmp_path: Path, form: str, field: str, result: str) -> None:
    file = tmp_path / "a"
    if form == "json":
        file.write_text(json.dumps(RECORD) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([RECORD]), file)
    source = corpus(paths=[str(file)], format=form, text_field=field)
    if " " not in result:
        assert texts_of(source) == [result]
        return
    with pytest.raises(DataError) as error:
        texts_of(source)
    assert result in str(error.value)


def test_a_field_of_that_name_comes_first(tmp_path: Path) -> None:
    record = {"a": {"b": "inner"}, "a.b": "literal"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n" + '{"a": {"b": "second"}}\n')
    assert texts_of(corpus(paths=[str(tmp_path / "a.jsonl")], text_field="a.b")) == [
        "literal",
        "second",
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
    tables = corpus(paths=[str(tmp_path / "a.parquet")], format="parquet", text_field="a.b")
    assert texts_of(tables) == ["literal"]


def test_of_a_column_with_fields_only_the_wanted_ones_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"a": {"text": "short", "blob": "x" * 1000}}, {"a": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    records = []
    monkeypatch.setattr(Corpus, "_read", lambda self, record: records.append(record) or (None, ""))
    source = corpus(paths=[str(tmp_path / "a.parquet")], format="parquet", text_field="a.text")
    list(source.documents([]))
    assert records == [{"a": {"text": "short"}}, {"a": None}]
    monkeypatch.undo()
    bad: list[BadRecord] = []
    assert [document.text for document in source.documents(bad)] == ["short"]
    assert bad[0].reason.startswith("has null instead of an object in the field 'a'")


def test_a_key_that_is_there_twice_on_the_way_to_a_field(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = ['{"a": {"b": "1"}, "a": {"b": "2"}}', '{"a": {"b": "1", "b": "2"}}']
    lines += ['{"a": {"b": "good", "c": 1, "c": 2}}', '{"a": {"b": "good"}, "z": 1, "z": 2}']
    file.write_text("\n".join(lines))
    bad: list[BadRecord] = []
    source = corpus(paths=[str(file)], text_field="a.b")
    assert [document.text for document in source.documents(bad)] == ["good", "good"]
    assert [b.reason.split(" twice")[0] for b in bad] == ["has the key 'a'", "has the key 'b'"]


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


def test_a_wanted_key_that_is_there_twice_is_a_bad_record(tmp_path: Path) -> None:
    """Readers of JSON differ in which of the values they take; other keys do not matter."""
    lines = ('{"text": "a", "n": 1, "n": 2}', '{"n": 1, "text": "b", "text": "c"}')
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    bad: list[BadRecord] = []
    documents = corpus(paths=[str(tmp_path)]).documents(bad)
    assert [document.text for document in documents] == ["a"]
    ((place, _, reason),) = bad
    assert place == f"line 2 of {tmp_path / 'a.jsonl'}"
    assert reason == "has the key 'text' twice, and either value could be meant"

    message = '{"role": "assistant", "content": "x", "content": "y"}'
    turns = f'[{{"role": "user", "content": "?"}}, {message}]'
    (tmp_path / "a.jsonl").write_text(f'{{"messages": {turns}}}\n')
    with pytest.raises(DataError, match=r"line 1 of .* has the key 'content' twice"):
        texts_of(corpus(paths=[str(tmp_path)], content="conversation"))


def test_empty_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x", "", " \n", "y"]))
    source = corpus(paths=[str(tmp_path / "a.jsonl")])
    assert texts_of(source) == ["x", "y"] and source.empty == 2


@pytest.mark.parametrize(
    ("form", "place"), [("json", r"line 2 of .*b\.jsonl is not"), ("text", r"b\.jsonl is not")]
)
def test_not_utf8_names_the_file_and_the_place(tmp_path: Path, form: str, place: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["fine"]))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=rf"{place} UTF-8 at byte (13|30)\.$"):
        texts_of(corpus(paths=[str(tmp_path)], format=form))


MANY = jsonl([f"text {i} " + "x" * 1000 for i in range(300)])
NESTED = b'{"text":"a","x":{"y":1},"n":1}\n{"text":"b","x":[1],"n":"one"}\n'


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (MANY + b'{"text": "last", "extra": 1}\n', 301),
        (b'{"text":"a","n":1}\n' + MANY + b'{"text":"b","n":"one"}\n{"text":"c"}\n', 303),
        (NESTED, ["a", "b"]),
        (b'{"text":"2024-01-01T00:00:00"}\n' * 2, ["2024-01-01T00:00:00"] * 2),
        (b'{"text":"a","n":%s}\n{"text":"b","n":1e400}\n' % (b"9" * 5000), ["a", "b"]),
        (b'{"text":"a","text ":NaN}\r\n\r\n{"text":"b"}', ["a", "b"]),
        (b'\xef\xbb\xbf{"text":"a"}\n', ["a"]),
        (b'{"text":"a"} {"text":"b"}\n', ["a", "b"]),
        (b'{\n "text": "a"\n}\n{\n "text": "b"\n}\n', ["a", "b"]),
        (b'[{"text":"a","n":1},\n{"text":"b","n":"x","z":null}]', ["a", "b"]),
    ],
)
def test_only_the_text_field_matters(
    tmp_path: Path, content: bytes, texts: list[str] | int
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    documents = texts_of(corpus(paths=[str(tmp_path / "a.jsonl")]))
    assert (len(documents) if isinstance(texts, int) else documents) == texts


BAD_LINES = [
    (b'{"text": null}', "has null instead of a string in the field 'text'"),
    (b'{"text": 1}', "has a number instead of a string in the field 'text'"),
    (b'{"text": true}', "has true instead of a string in the field 'text'"),
    (b'{"body": "x"}', r"has no field 'text'; its fields are body \(set `text_field` of source"),
    (b'{"text": "x"', r"is not JSON \(Expecting ',' delimiter at character 13\)"),
    (b'{"text": "\xff"}', "is not UTF-8 at byte 10"),
    (b'{"text": "a\\ud800"}', r"has the lone surrogate U\+D800 at character 1, which is not"),
    (b"[" * 100_000, "is not JSON that can be read"),
    (b'["x"]', "is a list instead of an object"),
    (b"3", "is a number instead of an object"),
]


def test_a_bad_line_is_one_bad_record(tmp_path: Path) -> None:
    lines = [line for bad, _ in BAD_LINES for line in (b'{"text": "good"}', bad)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    source = corpus(paths=[str(tmp_path / "a.jsonl")])
    bad: list[BadRecord] = []
    assert [d.text for d in source.documents(bad)] == ["good"] * len(BAD_LINES)
    assert [record.number for record in bad] == list(range(2, len(lines) + 1, 2))
    for record, (_, reason) in zip(bad, BAD_LINES, strict=True):
        assert record.place == f"line {record.number} of {tmp_path / 'a.jsonl'}"
        assert re.match(reason, record.reason), record
    with pytest.raises(DataError, match=r"^line 2 of .*a\.jsonl has null instead of a string"):
        texts_of(source)


def test_bad_rows_of_a_table(tmp_path: Path) -> None:
    raw = pyarrow.array([b"one", b"\xff", None, b"two"]).view(pyarrow.utf8())
    others = pyarrow.array([[{"x": 1}]] * 4)
    pyarrow.parquet.write_table(pyarrow.table({"text": raw, "n": others}), tmp_path / "a.parquet")
    bad: list[BadRecord] = []
    source = corpus(paths=[str(tmp_path / "a.parquet")], format="parquet")
    assert [d.text for d in source.documents(bad)] == ["one", "two"]
    assert [(record.number, record.reason) for record in bad] == [
        (2, "is not UTF-8 at byte 0 of the field 'text'"),
        (3, "has null instead of a string in the field 'text'"),
    ]


def test_two_columns_of_a_name(tmp_path: Path) -> None:
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has 2 columns 'text'"):
        texts_of(corpus(paths=[str(tmp_path / "a.parquet")], format="parquet"))


PARQUET = "is a parquet table; set `format: parquet` of source 's'"


@pytest.mark.parametrize(
    ("name", "content", "form", "message"),
    [
        ("a.txt", b"Hello.\n", "json", r"line 1 of .*a\.txt is not JSON .*; set `format: text` of"),
        ("a.parquet", b"PAR1..", "json", rf"a\.parquet {PARQUET}"),
        ("a", b"PAR1..", "text", PARQUET),
        ("a.jsonl", b"{}\n", "parquet", "a.jsonl is not a parquet table; set `format: json` or"),
        ("a.parquet", b"PAR1..", "parquet", "a.parquet is a damaged parquet table: "),
        ("a.zip", b"PK", "json", "a.zip is an archive; unpack it"),
        ("a.tar.gz", gzip.compress(b"x", mtime=0), "text", r"a.tar.gz is an archive; unpack it"),
        ("a.jsonl", b"PK\x03\x04", "json", "a.jsonl is an archive; unpack it"),
        (
            "a.GZ",
            gzip.compress(b"x", mtime=0),
            "json",
            r"a.GZ is compressed by gzip; let its name end in",
        ),
        ("a", bz2.compress(b"x"), "text", r"a is compressed by bz2; let its name end in \.bz2"),
        ("a.jsonl", lzma.compress(b"x"), "json", r"is compressed by xz; let its name end in \.xz"),
        ("a", zstandard.compress(b"x"), "json", r"is compressed by zstd; let .* end in \.zst"),
        ("a.json", b'[{"text": "a"},', "json", "a.json is neither a list of objects in JSON nor"),
    ],
)
def test_the_format_that_was_meant(
    tmp_path: Path, name: str, content: bytes, form: str, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        texts_of(corpus(paths=[str(tmp_path / name)], format=form))
    assert "\n" not in str(caught.value)


def test_two_sources_do_not_read_the_same_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]))
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    one = corpus(name="one", paths=[str(tmp_path / "a.jsonl")])
    two = {"name": "two", "paths": [str(tmp_path / "b.jsonl")]}
    with pytest.raises(DataError, match=r"'one' and 'two' both read .*b\.jsonl, so that its text"):
        require_distinct([one, corpus(**two)])
    require_distinct([one, corpus(**two, text_field="summary")])
    hub = {"dataset": "x/y", "dataset_subset": "en"}
    with pytest.raises(DataError, match=r"'one' and 'two' both read x/y"):
        require_distinct([corpus(name="one", **hub), corpus(name="two", **hub)])
    require_distinct([corpus(name="one", **hub), corpus(name="two", dataset="x/y")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"body": "x"}\n', "line 1 .* no field 'text'; its fields are body"),
        (b'{"text": "x"}\n{"text": null}\n', "line 2 .* null instead of a string in the field"),
        (b'{"text": "x"\n', "line 1 of .*a.jsonl is not JSON"),
        (b"", "source 's' holds no document"),
        (b'{"text": ""}\n', "source 's' holds no document: 1 files, 1 empty documents"),
    ],
)
def test_bad_content_is_one_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        texts_of(corpus(paths=[str(tmp_path / "a.jsonl")]))
    assert "\n" not in str(caught.value)


def test_text_that_cannot_be_used_names_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("five!")
    monkeypatch.setattr("data.prepare.corpus._MAX_CHARACTERS", 4)
    with pytest.raises(DataError, match=r"^\S+a\.txt has 5 characters"):
        texts_of(corpus(paths=[str(tmp_path)], format="text"))


@pytest.mark.parametrize("fields", [{}, {"paths": ["x"], "dataset": "y"}])
def test_one_origin(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="either `paths` or `dataset`"):
        SourceConfig.model_validate({"name": "s", **fields})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"version": 1, "data": [{"text": "a"}]}\n', "no record: it has records in 'data'"),
        (b'{\n"data": {"1": {"text": "a"}}}\n', "record 1 of .* it has records in 'data'"),
        (b'{"1": {"text": "a"}, "2": {"text": "b"}}', "no record: it has records in '1'"),
        (b'[{"text": "a"}]\n[{"text": "b"}]\n', "record 1 of .* is a list of records instead"),
        (b'{"text": "a"}\n[{"text": "b"}]\n', "line 2 of .* is a list of records instead"),
        (gzip.compress(b"x", mtime=0), "a.jsonl is compressed by gzip"),
    ],
)
def test_what_holds_several_records_is_no_bad_record(
    tmp_path: Path, content: bytes, message: str
) -> None:
    """How many documents would be lost is unknown, so that no fraction of them is tolerated."""
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(corpus(paths=[str(tmp_path)]).documents([]))


def test_a_record_without_text_may_have_a_nested_one(tmp_path: Path) -> None:
    lines = ('{"text": "a"}', '{"id": 2, "comments": [{"text": "b"}]}', '{"meta": {"n": 1}}')
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    bad: list[BadRecord] = []
    assert [document.text for document in corpus(paths=[str(tmp_path)]).documents(bad)] == ["a"]
    assert len(bad) == 2
