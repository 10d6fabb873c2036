"""Shards in parts: any number of processes, killed at any moment, bad records quarantined."""

import json
import multiprocessing
import os
import random
from pathlib import Path

import pytest

import data.prepare.work_item
from data.config import DataConfig
from data.errors import DataError
from data.lease import Lease
from data.manifest import Manifest
from data.prepare.run import prepare
from data.text.tokenizer import Tokenizer
from tests.data.kills import kill_after
from tests.distributed import server
from tests.megatron_shards import indexed_module

TEXTS = [f"Number {i} of many, " * (i % 9 + 1) + "▁<｜User｜> é\n" for i in range(200)]
FILES = 6


@pytest.fixture
def parts(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Two sources: 6 files with two in each part, and 200 small files with many in each part."""
    for i in range(FILES):
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[i::FILES]]
        (tmp_path / f"{i:02d}.jsonl").write_text("".join(lines))
    (tmp_path / "tree").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "tree" / f"{i:03d}.txt").write_text(text)
    monkeypatch.setattr(data.prepare.work_item, "_ITEM_BYTES", 6000)
    sources = [
        {"name": "a", "paths": [str(tmp_path / "*.jsonl")]},
        {"name": "tree", "paths": [str(tmp_path / "tree")], "format": "text", "split": "train"},
    ]
    fields = {"sources": sources, "shards": str(tmp_path / "one"), "prepare_workers": 1}
    return DataConfig.model_validate(config.model_dump() | fields)


def elsewhere(config: DataConfig, name: str, **fields: object) -> DataConfig:
    shards = str(Path(config.shards).with_name(name))
    return DataConfig.model_validate(config.model_dump() | {"shards": shards} | fields)


def contents(config: DataConfig) -> dict[str, bytes]:
    root = Path(config.shards)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_megatron_reads_every_token_once_and_in_order(parts: DataConfig) -> None:
    manifest = prepare(parts, progress=False)
    tokenizer = Tokenizer(parts.tokenizer.path)
    assert len(manifest.of_split("train")) == 7
    texts: dict[str, list[str]] = {"a": [], "tree": []}
    for shard in manifest.shards:
        path = Path(parts.shards) / manifest.folder / shard.name
        dataset = indexed_module().IndexedDataset(str(path))
        assert len(dataset.document_indices) == shard.documents + 1
        for ids in dataset:
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            text = tokenizer.decode(ids[1:-1].tolist())
            assert tokenizer.encode(text) == ids[1:-1].tolist()
            texts[shard.source].append(text)
    assert texts["tree"] == TEXTS
    assert sorted(texts["a"]) == sorted(TEXTS)


def test_processes_change_nothing(parts: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    server()
    monkeypatch.setattr("data.prepare.engines.engine._BYTES_PER_PROCESS", 1)
    several = elsewhere(parts, "several", prepare_workers=2)
    assert prepare(parts, progress=False) == prepare(several, progress=False)
    assert contents(parts) == contents(several)


def test_killed_ten_times(parts: DataConfig) -> None:
    """At a random moment after a random number of its parts were complete."""
    count = len(prepare(parts, progress=False).of_split("train"))
    rng = random.Random(7)
    unpublished, with_parts = 0, 0
    for trial in range(10):
        killed = elsewhere(parts, f"killed{trial}")
        child = multiprocessing.get_context("fork").Process(target=prepare, args=(killed, False))
        child.start()
        kill_after(child, Path(killed.shards), ".unfinished-*/*.json", rng.randrange(count), rng)
        unpublished += not (Path(killed.shards) / "manifest.json").exists()
        with_parts += bool(list(Path(killed.shards).glob(".unfinished-*/*.json")))
        prepare(killed, progress=False)
        assert contents(killed) == contents(parts), trial
    assert unpublished and with_parts  # some died before the end, some after a complete part


def test_complete_parts_are_kept_and_partial_ones_are_not(parts: DataConfig) -> None:
    good = Path(parts.sources[0].paths[0]).with_name("05.jsonl")
    whole = good.read_bytes()
    reference = prepare(elsewhere(parts, "reference"), progress=False)
    folder = Path(parts.shards) / f".unfinished-{reference.digest[:16]}"
    folder.mkdir(parents=True)
    (folder / "a-train-00000.bin").write_bytes(b"half")
    (folder / ".a-train-00001.77.bin").write_bytes(b"half")
    for file in Path(parts.shards).with_name("reference").glob(f"{reference.folder}/a*-00002.*"):
        (folder / file.name).write_bytes(file.read_bytes())  # complete before an earlier one
    prepare(parts, progress=False)
    assert contents(parts) == contents(elsewhere(parts, "reference"))
    good.write_bytes(whole + b'{"text": 3}\n')
    with pytest.raises(DataError, match=r"05\.jsonl"):
        prepare(parts, progress=False, overwrite=True)
    records = list(Path(parts.shards).glob(".unfinished-*/a-*.json"))
    assert records
    times = {record: record.stat().st_mtime_ns for record in records}
    with pytest.raises(DataError, match=r"05\.jsonl"):
        prepare(parts, progress=False, overwrite=True)
    assert {record: record.stat().st_mtime_ns for record in records} == times
    cut = next(Path(parts.shards).glob(".unfinished-*/a-train-*.bin"))
    content = cut.read_bytes()
    cut.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"05\.jsonl"):
        prepare(parts, progress=False, overwrite=True)
    assert cut.read_bytes() == content  # a record alone does not make a part complete


def test_bad_records_are_quarantined_up_to_a_share(
    parts: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.prepare.work_item, "_ITEM_BYTES", 1 << 20)
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[:98]]
    (tmp_path / "bad.jsonl").write_text("".join([lines[0], '{"text": null}\n', *lines[1:], "{}\n"]))
    sources = [{"name": "b", "paths": [str(tmp_path / "bad.jsonl")]}]
    tolerant = elsewhere(parts, "bad", sources=sources, max_bad_record_fraction=0.02)
    manifest = prepare(tolerant, progress=False)
    assert manifest.bad_records == {"b": 2}
    assert sum(shard.documents for shard in manifest.shards) == 98
    (listed,) = Path(tolerant.shards).rglob("*.quarantine.jsonl")
    records = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [record["number"] for record in records] == [2, 100]
    assert records[0]["reason"] == "has null instead of a string in the field 'text'"
    assert records[1]["reason"].startswith("has no field 'text'; its fields are none")
    with pytest.raises(DataError, match=r"'b' has 2 bad records, a fraction of 0.02; .* 0.019"):
        prepare(elsewhere(tolerant, "strict", max_bad_record_fraction=0.019), progress=False)
    with pytest.raises(DataError, match=r"line 2 of .*bad\.jsonl has null instead"):
        prepare(elsewhere(tolerant, "none", max_bad_record_fraction=0.0), progress=False)


@pytest.mark.parametrize(
    ("name", "line", "written"),
    [
        ("bad.jsonl", b'{"te\\ud800xt": 1}\n', r"te\ud800xt"),
        (os.fsdecode(b"caf\xe9.jsonl"), b'{"text": null}\n', r"caf\udce9.jsonl"),
    ],
    ids=["field", "file"],
)
def test_names_that_are_not_unicode_are_quarantined(
    parts: DataConfig, tmp_path: Path, name: str, line: bytes, written: str
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / name).write_bytes(line + b'{"text": "good"}\n')
    sources = [{"name": "b", "paths": [str(folder)]}]
    tolerant = elsewhere(parts, "bad", sources=sources, max_bad_record_fraction=0.5)
    assert prepare(tolerant, progress=False).bad_records == {"b": 1}
    (listed,) = Path(tolerant.shards).rglob("*.quarantine.jsonl")
    (text,) = listed.read_text().splitlines()
    assert written in text and json.loads(text)["number"] == 1


def test_too_long_document(
    parts: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.prepare.corpus._MAX_CHARACTERS", 30)
    with pytest.raises(DataError, match="characters; a document may have 30"):
        prepare(parts, progress=False)


def test_one_run_at_a_time(parts: DataConfig) -> None:
    refused = pytest.raises(DataError, match=r"`v4 data prepare` \(process")
    with Lease(Path(parts.shards), "v4 data prepare"), refused:
        prepare(parts, progress=False)
    prepare(parts, progress=False)
    assert Manifest.load(parts.shards).bad_records == {"a": 0, "tree": 0}
