"""`v4 data prepare` and what is wrong with its input: one sentence, exit code 2, nothing lost."""

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from tests.full_disk import full_disk
from tests.trainer.tiny import make_tiny
from trainer.commands import main

LINES = "".join(json.dumps({"text": f"text number {i} " * 5}) + "\n" for i in range(300)).encode()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> Path:
    """A config with its own copy of good shards, and one source more."""
    fields = yaml.safe_load(tiny.read_text())
    shutil.copytree(fields["data"]["shards"], tmp_path / "shards")
    fields["data"]["shards"] = str(tmp_path / "shards")
    fields["data"]["sources"].append({"name": "new", "paths": [str(tmp_path / "new*")]})
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def changed(config: Path, **fields: object) -> Path:
    """The config with other fields of its last source, or of `data` where they are named so."""
    content = yaml.safe_load(config.read_text())
    for name, value in fields.items():
        where = content["data"] if name in ("source_weights", "tokenizer", "transforms") else None
        (where if where is not None else content["data"]["sources"][-1])[name] = value
    config.write_text(yaml.safe_dump(content))
    return config


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def corrupt_gzip(folder: Path, config: Path) -> Path:
    content = gzip.compress(LINES)
    (folder / "new.jsonl.gz").write_bytes(content[: len(content) // 2])
    return config


def no_gzip(folder: Path, config: Path) -> Path:
    (folder / "new.jsonl.gz").write_bytes(b"\x1f\x8b" + bytes(range(256)))
    return config


def parquet_without_field(folder: Path, config: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), folder / "new.parquet")
    return changed(config, format="parquet")


def no_parquet(folder: Path, config: Path) -> Path:
    (folder / "new.parquet").write_bytes(b"PAR1 and no more")
    return changed(config, format="parquet")


def invalid_utf8(folder: Path, config: Path) -> Path:
    (folder / "new.jsonl").write_bytes(LINES + b'{"text": "\xff"}\n')
    return config


def empty_source(folder: Path, config: Path) -> Path:
    (folder / "new.jsonl").write_bytes(b'{"text": ""}\n')
    return config


def negative_weight(folder: Path, config: Path) -> Path:
    (folder / "new.jsonl").write_bytes(LINES)
    return changed(config, source_weights={"words": 1.0, "new": -0.5})


def weights_of_nothing(folder: Path, config: Path) -> Path:
    (folder / "new.jsonl").write_bytes(LINES)
    return changed(config, source_weights={"words": 0.0, "new": 0.0})


def too_long(folder: Path, config: Path) -> Path:
    (folder / "new.jsonl").write_bytes(LINES + json.dumps({"text": "x" * 2000}).encode() + b"\n")
    return config


def no_tokenizer(folder: Path, config: Path) -> Path:
    (folder / "new.jsonl").write_bytes(LINES)
    return changed(config, tokenizer={"path": str(folder / "nowhere"), "vocab_size": 400})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (corrupt_gzip, r"new\.jsonl\.gz is cut off"),
        (no_gzip, r"new\.jsonl\.gz is damaged in frame 1"),
        (parquet_without_field, r"new\.parquet has no field 'text'; its fields are body"),
        (no_parquet, r"new\.parquet is a damaged parquet table"),
        (invalid_utf8, r"line 301 of .*new\.jsonl is not UTF-8 at byte 10"),
        (empty_source, "source 'new' holds no document: 1 files, 1 empty"),
        (negative_weight, r"source_weights.new is -0\.5; it should be at least 0"),
        (weights_of_nothing, "source_weights sum to 0"),
        (too_long, r"line 301 of .* has 2000 characters; a document may have 1000"),
        (no_tokenizer, "no tokenizer at"),
    ],
)
def test_one_sentence_and_nothing_lost(
    config: Path,
    tmp_path: Path,
    spoil: Callable[[Path, Path], Path],
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("data.prepare.corpus._MAX_CHARACTERS", 1000)
    before = files(tmp_path / "shards")
    good = config.read_text()
    assert main(["prepare", str(spoil(tmp_path, config)), "--overwrite"]) == 2
    output = capfd.readouterr()
    assert output.out == "" and output.err.startswith("v4: error: ") and output.err.count("\n") == 1
    assert re.search(message, output.err), output.err
    kept = files(tmp_path / "shards")
    assert {name: kept[name] for name in before} == before
    assert all(name.startswith(".unfinished-") for name in kept.keys() - before.keys())
    for file in tmp_path.glob("new*"):
        file.unlink()
    (tmp_path / "new.jsonl").write_bytes(LINES)
    config.write_text(good)
    assert main(["prepare", str(config), "--overwrite"]) == 0
    assert not any(name.startswith(".") for name in files(tmp_path / "shards"))


@pytest.mark.parametrize("filters", [None, {"min_characters": 1, "quality_rules": []}])
def test_a_full_disk(
    config: Path, tmp_path: Path, filters: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """While shards are written, and while documents are screened."""
    (tmp_path / "new.jsonl").write_bytes(LINES)
    content = yaml.safe_load(config.read_text())
    content["data"]["filters"] = filters
    config.write_text(yaml.safe_dump(content))
    before = files(tmp_path / "shards")
    with full_disk(8192):
        assert main(["prepare", str(config), "--overwrite"]) == 2
    assert "cannot write" in capsys.readouterr().err
    kept = files(tmp_path / "shards")
    assert {name: kept[name] for name in before} == before
    assert main(["prepare", str(config), "--overwrite"]) == 0


def test_shards_of_another_tokenizer(
    config: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.jsonl").write_bytes(LINES)
    settings = {"path": str(tmp_path / "other"), "vocab_size": 390}
    assert main(["tokenizer-train", str(changed(config, tokenizer=settings))]) == 0
    capsys.readouterr()
    assert main(["data-report", str(config)]) == 2
    output = capsys.readouterr().err
    assert "were made with another tokenizer" in output and output.count("\n") == 1
