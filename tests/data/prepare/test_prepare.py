"""Shards: their contents, and their atomic replacement."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from data.errors import DataError
from data.indexed import open_shard
from data.manifest import Manifest
from data.prepare import run
from data.prepare.run import prepare
from data.text.tokenizer import Tokenizer
from tests.full_disk import full_disk


def changed(config: DataConfig, **fields: object) -> DataConfig:
    return DataConfig.model_validate(config.model_dump() | fields)


def write_source(path: Path, texts: list[str]) -> dict[str, object]:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"name": path.stem, "paths": [str(path)]}


def texts_of(config: DataConfig, split: str) -> list[str]:
    """The documents of a split, decoded; bos and eos are checked and removed."""
    tokenizer = Tokenizer(config.tokenizer.path)
    manifest = Manifest.load(config.shards)
    texts = []
    for shard in manifest.of_split(split):  # type: ignore[arg-type]
        prefix = Path(config.shards) / manifest.folder / shard.name
        for ids in open_shard(prefix, shard.documents, shard.tokens):
            assert (ids[0], ids[-1]) == (0, 1) and ids.dtype == "uint16"
            texts.append(tokenizer.decode(ids[1:-1].tolist()))
    return texts


def files_below(folder: str) -> dict[str, tuple[int, bytes]]:
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_shards_hold_every_document_once(config: DataConfig, documents: list[str]) -> None:
    train, validation = texts_of(config, "train"), texts_of(config, "validation")
    assert sorted(train + validation) == sorted(documents)
    assert 0.1 < len(set(validation)) / len(set(documents)) < 0.35
    manifest = Manifest.load(config.shards)
    assert sum(shard.bytes for shard in manifest.shards) == sum(
        map(len, map(str.encode, documents))
    )


def test_equal_texts_fall_on_the_same_side(config: DataConfig, tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(50)]
    sources = [write_source(tmp_path / name, texts) for name in ("a.jsonl", "b.jsonl")]
    both = changed(config, sources=sources, shards=str(tmp_path / "shards"))
    manifest = prepare(both, progress=False)
    assert [shard.name for shard in manifest.shards] == [
        *("a-train-00000", "a-validation-00000", "b-train-00000", "b-validation-00000")
    ]
    train, validation = set(texts_of(both, "train")), set(texts_of(both, "validation"))
    assert validation and not train & validation


def test_explicit_split(config: DataConfig, tmp_path: Path) -> None:
    sources = [
        write_source(tmp_path / "a.jsonl", ["a", "b"]) | {"split": "train"},
        write_source(tmp_path / "b.jsonl", ["c", "", "d"]) | {"split": "validation"},
    ]
    both = changed(config, sources=sources, shards=str(tmp_path / "shards"))
    manifest = prepare(both, progress=False)
    assert (texts_of(both, "train"), texts_of(both, "validation")) == (["a", "b"], ["c", "d"])
    assert manifest.empty_documents == {"a": 0, "b": 1}


def test_what_is_skipped_is_counted(config: DataConfig, tmp_path: Path) -> None:
    sources = [
        write_source(tmp_path / "a.jsonl", ["a", "b"]),
        write_source(tmp_path / "b.jsonl", ["c", "", "d"]),
    ]
    (tmp_path / "none.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    sources[1]["paths"] = [str(tmp_path / f"{name}.jsonl") for name in ("b", "blank", "none")]
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write('{"text": "e", "text": "f"}\n')
    settings = {"shards": str(tmp_path / "shards"), "max_bad_record_fraction": 0.5}
    manifest = prepare(changed(config, sources=sources, **settings), progress=False)
    assert manifest.empty_files == {"a": 0, "b": 2} and manifest.bad_records == {"a": 0, "b": 1}
    assert manifest.skipped() == [
        "source 'b': skipped 1 empty documents, 1 bad records, 2 files without a record"
    ]
    before = manifest.model_dump(exclude={"empty_files"})
    assert Manifest.model_validate(before).skipped() == [
        "source 'b': skipped 1 empty documents, 1 bad records"
    ]


def test_a_file_that_grows_meanwhile_is_refused(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards would have other text than their digest stands for."""
    source = write_source(tmp_path / "a.jsonl", ["one", "two"]) | {"split": "train"}
    one = changed(config, sources=[source], shards=str(tmp_path / "shards"))
    plain = run._write

    def write(*arguments: Any) -> Any:
        with (tmp_path / "a.jsonl").open("a") as file:
            file.write('{"text": "three"}\n')
        return plain(*arguments)

    monkeypatch.setattr(run, "_write", write)
    with pytest.raises(DataError, match=r"a\.jsonl changed while it was read; start again"):
        prepare(one, progress=False)
    assert not list((tmp_path / "shards").glob("*"))
    monkeypatch.undo()
    prepare(one, progress=False)
    assert texts_of(one, "train") == ["one", "two", "three"]


def test_second_run_changes_nothing_and_other_input_does(
    config: DataConfig, tmp_path: Path
) -> None:
    source = write_source(tmp_path / "a.jsonl", ["one", "two"]) | {"split": "train"}
    one = changed(config, sources=[source], shards=str(tmp_path / "shards"))
    first = prepare(one, progress=False)
    before = files_below(one.shards)
    (Path(one.shards) / "notes").mkdir()
    os.utime(tmp_path / "a.jsonl", (0, 0))
    assert prepare(one, progress=False) == first
    assert files_below(one.shards) == before
    write_source(tmp_path / "a.jsonl", ["one", "two!"])
    with pytest.raises(DataError, match=r"holds shards of other text.* --overwrite"):
        prepare(one, progress=False)
    assert files_below(one.shards) == before
    assert prepare(one, progress=False, overwrite=True).digest != first.digest
    assert texts_of(one, "train") == ["one", "two!"]
    assert len(files_below(one.shards)) == 6  # the replaced shards are removed
    assert (Path(one.shards) / "notes").is_dir()  # not made by prepare, so it is kept


def test_damaged_shards_are_made_again(config: DataConfig, tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.jsonl", ["one", "two"]) | {"split": "train"}
    one = changed(config, sources=[source], shards=str(tmp_path / "shards"))
    manifest = prepare(one, progress=False)
    binary = tmp_path / "shards" / manifest.folder / "a-train-00000.bin"
    binary.write_bytes(binary.read_bytes()[:-2])
    prepare(one, progress=False)
    assert texts_of(one, "train") == ["one", "two"]


def test_shards_without_their_manifest_are_kept(config: DataConfig, tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.jsonl", ["one", "two"]) | {"split": "train"}
    one = changed(config, sources=[source], shards=str(tmp_path / "shards"))
    manifest = prepare(one, progress=False)
    (tmp_path / "shards/manifest.json").rename(tmp_path / "manifest.json")
    before = files_below(one.shards)
    with pytest.raises(DataError, match=rf"shards in {manifest.folder} and no manifest.json"):
        prepare(changed(one, validation_fraction=0.5), progress=False)
    assert files_below(one.shards) == before
    prepare(one, progress=False, overwrite=True)
    assert texts_of(one, "train") == ["one", "two"]


def test_copies_are_named(
    config: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    write_source(folder / "a.jsonl", ["one", "two"])
    text = (folder / "a.jsonl").read_bytes()
    (folder / "a (1).jsonl").write_bytes(text)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(text))
    source = {"name": "a", "paths": [str(folder)], "split": "train"}
    prepare(changed(config, sources=[source], shards=str(tmp_path / "shards")), progress=False)
    error = capsys.readouterr().err
    assert "a.jsonl seems to be a copy of" in error and "(and 1 more)" in error


def test_a_changed_dataset_on_this_machine_is_noticed(
    config: DataConfig, tmp_path: Path, cache: Path
) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    write_source(hub / "train.jsonl", ["one", "two"])
    source = {"name": "a", "dataset": str(hub), "split": "train"}
    one = changed(config, sources=[source], shards=str(tmp_path / "shards"))
    prepare(one, progress=False)
    write_source(hub / "train.jsonl", ["one", "three"])
    with pytest.raises(DataError, match="holds shards of other text"):
        prepare(one, progress=False)


def test_full_disk_leaves_earlier_shards_intact(config: DataConfig, tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.jsonl", ["one"]) | {"split": "train"}
    one = changed(config, sources=[source], shards=str(tmp_path / "shards"))
    prepare(one, progress=False)
    before = files_below(one.shards)
    write_source(tmp_path / "a.jsonl", [f"number {i} of many" for i in range(20_000)])
    for size in (100_000, 4096):
        with (
            full_disk(size),
            pytest.raises(DataError, match=r"cannot write the shards .* unchanged"),
        ):
            prepare(one, progress=False, overwrite=True)
        assert files_below(one.shards) == before
        assert len(list(Path(one.shards).iterdir())) == 2


def test_bad_text_leaves_earlier_shards_intact(config: DataConfig, tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.jsonl", ["one"]) | {"split": "train"}
    one = changed(config, sources=[source], shards=str(tmp_path / "shards"))
    prepare(one, progress=False)
    before = files_below(one.shards)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        prepare(one, progress=False, overwrite=True)
    assert files_below(one.shards) == before
    assert len(list(Path(one.shards).iterdir())) == 2


def test_damaged_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json in"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"digest": 3}')
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("outside", ["/", "../"])
def test_a_manifest_names_shards_inside_its_folder(
    config: DataConfig, tmp_path: Path, outside: str
) -> None:
    """A copied folder of shards is read, and completed, where it is."""
    made = Manifest.load(config.shards)
    shard = made.shards[0].model_copy(update={"name": f"{outside}{made.shards[0].name}"})
    for key, update in (
        ("folder", {"folder": f"{outside}{made.folder}"}),
        (r"shards\.0\.name", {"shards": (shard,)}),
    ):
        made.model_copy(update=update).save(tmp_path)
        with pytest.raises(DataError, match=rf"damaged \({key}: '.*' should be a relative path"):
            Manifest.load(tmp_path)
    made.model_copy(update={"folder": f"below/{made.folder}"}).save(tmp_path)
    assert Manifest.load(tmp_path).folder == f"below/{made.folder}"
