"""Decontamination: n-grams against brute force, the files of texts, counts and errors."""

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data.config import DataConfig
from data.errors import DataError
from data.filter_config import DecontaminationConfig
from data.prepare.filters.decontamination import Texts
from data.prepare.run import prepare
from tests.data.prepare.filters.made import words


def texts(*paths: Path, **fields: Any) -> Texts:
    origin = {"paths": [str(path) for path in paths]}
    return Texts(DecontaminationConfig.model_validate(origin | fields))


def grams(text: str, size: int) -> list[tuple[str, ...]]:
    parts = re.findall(r"[\u3000-\uffff]|\w+", text.lower())
    return [tuple(parts[i : i + size]) for i in range(len(parts) - size + 1)]


def test_matches_are_those_of_sets_of_tuples(tmp_path: Path) -> None:
    rng = random.Random(1)
    listed = [words(rng, rng.randrange(20, 60)) for _ in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in listed))
    known = {gram for text in listed for gram in grams(text, 5)}
    index = texts(tmp_path, ngram_words=5, min_matches=3)
    counts = set()
    for _ in range(200):
        parts = words(rng, 60).split()
        source = rng.choice(listed).split()
        length, place = rng.randrange(12), rng.randrange(10)
        parts[20 : 20 + length] = source[place : place + length]
        text = " ".join(parts).upper()
        count = sum(gram in known for gram in grams(text, 5))
        counts.add(count)
        detail = index.overlap(text)
        assert (detail is not None) == (count >= 3), (count, detail)
        if detail is not None:
            found = re.fullmatch(
                rf"{count} of 56 n-grams, text (\d+) of a.jsonl: '(.*)'", detail, re.DOTALL
            )
            assert found is not None, detail
            shared = grams(found[2].replace("\\n", "\n"), 5)
            assert len(shared) == 1 and shared[0] in grams(listed[int(found[1]) - 1], 5)
    assert min(counts) == 0 and max(counts) > 5


def test_every_format_and_script(tmp_path: Path) -> None:
    listed = ["one two three four", "吾輩は猫である名前", "five six seven eight nine"]
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress(b'{"q": {"text": "%s"}}' % listed[0].encode())
    )
    pyarrow.parquet.write_table(pyarrow.table({"q": [{"text": listed[1]}]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text(f"x\n{listed[2]}\n")
    index = texts(tmp_path, ngram_words=4, text_field="q.text")
    for text, name in zip(listed, ("a.jsonl.gz", "b.parquet", "c.txt"), strict=True):
        detail = index.overlap(f"before, {text.upper()} after")
        assert detail is not None and f"text 1 of {name}" in detail
    assert index.overlap("one two three, five six seven x") is None
    half = texts(tmp_path, ngram_words=4, text_field="q.text", min_fraction=0.5)
    assert half.overlap(listed[0]) is not None
    assert half.overlap(listed[0] + " and more words") is None


def test_a_text_shorter_than_an_n_gram_matches_a_document_of_its_words(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Yes, of course!")
    index = texts(tmp_path)
    assert index.overlap("yes of course") is not None
    assert index.overlap("yes of course not") is None


def test_prepare_drops_and_its_digest_has_the_texts(config: DataConfig, tmp_path: Path) -> None:
    rng = random.Random(2)
    documents = [words(rng, 120) for _ in range(30)]
    secret = " ".join(documents[7].split()[40:60])
    (tmp_path / "list.txt").write_text(secret)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    fields = {
        "sources": [{"name": "s", "paths": [str(tmp_path / "a.jsonl")]}],
        "filters": {"decontamination": {"paths": [str(tmp_path / "list.txt")]}},
        "shards": str(tmp_path / "shards"),
        "prepare_workers": 1,
    }
    made = DataConfig.model_validate(config.model_dump() | fields)
    first = prepare(made, progress=False)
    stats = first.dropped["s"]["contaminated"]
    assert stats.documents == 1 and stats.bytes == len(documents[7].encode())
    assert stats.examples[0].detail.startswith("8 of 108 n-grams, text 1 of list.txt: ")
    (tmp_path / "list.txt").write_text(secret + " more")
    with pytest.raises(DataError, match="other"):
        prepare(made, progress=False)
    assert prepare(made, progress=False, overwrite=True).digest != first.digest


def test_errors_name_the_setting_or_the_record(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.filters.decontamination: nothing to read at"):
        texts(tmp_path / "no")
    (tmp_path / "a.txt").write_text("?!")
    with pytest.raises(DataError, match=r"decontamination.paths name no text with a word"):
        texts(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match=r"line 1 of .*b.jsonl has no field 'text'; its fields"):
        texts(tmp_path)
