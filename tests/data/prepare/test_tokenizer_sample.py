"""The sample of the tokenizer's training: all of small sources, pieces of large ones."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig, SourceConfig
from data.errors import DataError
from data.prepare import tokenizer_sample
from data.prepare.corpus import Corpus
from data.prepare.filters.pii import E_MAIL
from data.prepare.splits import document_hash, is_validation
from data.prepare.tokenizer_sample import lowest_hashes, sample_texts
from tests.data.prepare.filters.made import words


def changed(config: DataConfig, **fields: Any) -> DataConfig:
    return DataConfig.model_validate(config.model_dump() | fields)


def size_of(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def test_of_small_sources_every_document_is_a_candidate(config: DataConfig) -> None:
    tokenizer = config.tokenizer.model_copy(update={"sample_bytes": 50_000})
    sample = sample_texts(config.model_copy(update={"tokenizer": tokenizer}))
    (source,) = config.sources
    documents = [d for d in Corpus(source) if not is_validation(source, d.text, 0.2)]
    assert sample == lowest_hashes(documents[::-1], 50_000)
    assert 20_000 < size_of(sample) <= 50_000
    assert not any(is_validation(source, text, 0.2) for text in sample)
    hashes = [document_hash(text) for text in sample]
    assert hashes == sorted(hashes)


def write(folder: Path) -> None:
    """2 MB in 40 files of a source, 4 MB in one of another, 2 MB compressed in a third."""
    rng = random.Random(1)
    folder.mkdir()

    def lines(name: str, size: int) -> bytes:
        text = ""
        while len(text) < size:
            text += json.dumps({"text": f"{name} {len(text)} {words(rng, 30)} a@b.org"}) + "\n"
        return text.encode()

    for number in range(40):
        (folder / f"many{number:02d}.jsonl").write_bytes(lines("many", 50_000))
    (folder / "one.jsonl").write_bytes(lines("one", 4_000_000))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(lines("packed", 2_000_000)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "corpus"
    write(path)
    return path


@pytest.fixture
def large(config: DataConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """A config of sources that count as too large to be read whole."""
    monkeypatch.setattr(tokenizer_sample, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(tokenizer_sample, "_MIN_PIECE_BYTES", 1000)
    names = ("many", "one", "packed")
    sources = [{"name": name, "paths": [str(folder / f"{name}*")]} for name in names]
    return changed(config, sources=sources, tokenizer=with_sample(config, 120_000))


def with_sample(config: DataConfig, size: int) -> dict[str, Any]:
    return config.tokenizer.model_dump() | {"sample_bytes": size}


def test_of_large_sources_pieces_are_read(
    large: DataConfig, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = sum(file.stat().st_size for file in folder.iterdir())
    assert whole > 16 * 120_000
    sample = sample_texts(large)
    counts = Counter({name: 0 for name in ("many", "one", "packed")})
    for text in sample:
        counts[text.split(" ", 1)[0]] += len(text.encode())
    assert 110_000 < counts.total() <= 120_000
    # A stream that is left before its end counts as text of its size, with its validation text.
    packed = (folder / "packed.jsonl.gz").stat().st_size
    for name, stored in (("many", 2e6), ("one", 4e6), ("packed", packed)):
        assert counts[name] / counts.total() == pytest.approx(stored / (6e6 + packed), rel=0.4)
    report = capsys.readouterr().out
    assert report.count("MB of text in") == 3
    assert "source 'many': read 0." in report and " of 40 files of 2 MB; 0.0 MB" in report
    assert "in 1 of 1 files of 4 MB" in report
    assert sample == sample_texts(large)
    moved = tmp_path / "moved"
    folder.rename(moved)
    try:
        sources = [
            {"name": source.name, "paths": [source.paths[0].replace(str(folder), str(moved))]}
            for source in large.sources
        ]
        assert sample == sample_texts(changed(large, sources=sources))
    finally:
        moved.rename(folder)


def test_what_is_read_is_bounded(large: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    documents = Corpus.documents

    def counted(self: Corpus, bad: Any = None) -> Any:
        for document in documents(self, bad):
            read.append(len(document.text.encode()))
            yield document

    monkeypatch.setattr(Corpus, "documents", counted)
    sample_texts(large)
    assert sum(read) < 2 * 4 * 120_000  # about four samples, one in five of it for validation


def test_weights_are_kept(large: DataConfig) -> None:
    sample = sample_texts(changed(large, source_weights={"many": 1.0, "packed": 3.0}))
    counts = Counter[str]()
    for text in sample:
        counts[text.split(" ", 1)[0]] += len(text.encode())
    assert counts["many"] == pytest.approx(30_000, rel=0.05)
    assert counts["packed"] == pytest.approx(90_000, rel=0.05)
    assert "one" not in counts


def test_the_tokenizer_sees_masked_text(large: DataConfig, config: DataConfig) -> None:
    for which in (large, changed(large, tokenizer=with_sample(config, 10**6))):
        assert all("a@b.org" in text for text in sample_texts(which))
        sample = sample_texts(changed(which, filters={"pii": "mask"}))
        assert all("a@b.org" not in text and E_MAIL in text for text in sample)


def test_a_dataset_of_the_hub_is_left_after_the_limit(
    large: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from data.prepare.readers import Record

    def records(source: SourceConfig) -> Any:
        return (Record("r", n, {"text": f"text {n} " * 100}) for n in range(10**9))

    monkeypatch.setattr("data.prepare.corpus.read_dataset", records)
    hub = {"name": "hub", "dataset": "some/name"}
    sample = sample_texts(changed(large, sources=[hub]))
    assert 100_000 < size_of(sample) <= 120_000
    assert "the sample is taken from the first 2 MB of some/name" in capsys.readouterr().out
    sources = [large.sources[0].model_dump(), hub]
    with pytest.raises(DataError, match=r"size of 'hub', a dataset of the hub, is unknown"):
        sample_texts(changed(large, sources=sources))
    weights = {"many": 1.0, "hub": 1.0}
    sample = sample_texts(changed(large, sources=sources, source_weights=weights))
    share = size_of([text for text in sample if text.startswith("text")])
    assert share == pytest.approx(60_000, rel=0.05)
