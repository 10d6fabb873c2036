"""The data report's figures against plain counts, and the page against the rows it shows."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from data.config import DataConfig
from data.errors import DataError
from data.prepare import prepare, train_tokenizer
from data.rows import Loader, shuffled
from data.text import Tokenizer
from tests.trainer.tiny import TINY
from trainer.config import RunConfig
from trainer.report.data import render, write_data_report
from trainer.report.data_facts import (
    DataFacts,
    collect,
    longest_tokens,
    measured_mixture,
    most_split_words,
)

TEXTS = {
    "a": [f"def f_{i}():\n    return {i}\n" * (i % 9 + 1) for i in range(40)],
    "b": ["<b>An & entity</b> Zyzzyva Zyzzyva qwrtzpsdf qwrtzpsdf\n" * 30, "short words\n" * 2],
}
FILTERS = {
    "min_characters": 8,
    "quality_rules": [],
    "exact_duplicates": False,
    "near_duplicate_similarity": None,
    "template_similarity": None,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("report")
    for name, texts in TEXTS.items():
        lines = [json.dumps({"text": text}) + "\n" for text in [*texts, "  ", "tiny<i>"]]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    data = DataConfig.model_validate(
        {
            "sources": [{"name": n, "paths": [str(folder / f"{n}.jsonl")]} for n in TEXTS],
            "tokenizer": {"path": str(folder / "tokenizer"), "vocab_size": 512},
            "shards": str(folder / "shards"),
            "seq_len": 64,
            "global_batch_size": 4,
            "validation_fraction": 0.0,
            "filters": FILTERS,
        }
    )
    train_tokenizer(data)
    prepare(data, progress=False)
    return data


@pytest.fixture(scope="module")
def tokenizer(config: DataConfig) -> Tokenizer:
    return Tokenizer(config.tokenizer.path)


@pytest.fixture(scope="module")
def facts(config: DataConfig, tokenizer: Tokenizer) -> DataFacts:
    return collect(config, config.seq_len, tokenizer.vocab_size)


def test_ids_that_the_tokenizer_has_not_are_named(config: DataConfig) -> None:
    """In shards of tools that pad the vocabulary."""
    with pytest.raises(DataError, match=r"id \d+"):
        collect(config, config.seq_len, 20)


def test_figures_are_plain_counts(facts: DataFacts, tokenizer: Tokenizer) -> None:
    for source, texts in zip(facts.sources, TEXTS.values(), strict=True):
        lengths = [len(ids) + 2 for ids in tokenizer.encode_batch(texts)]
        assert source.lengths.tolist() == lengths
        assert (source.documents, source.empty, source.bad) == (len(texts), 1, 0)
        assert {r: (n.documents, n.bytes) for r, n in source.filtered.items()} == {"length": (1, 7)}
        assert source.train_tokens == sum(lengths)
        assert source.bytes == sum(len(text.encode()) for text in texts)
    positions = [int(n) - 1 for source in facts.sources for n in source.lengths]
    assert facts.cut_best_fit == sum(n > 64 for n in positions)
    assert facts.fill == pytest.approx(sum(positions) / facts.rows / 64)
    assert facts.rows_concatenated == -(-sum(positions) // 64) <= facts.rows


def test_concatenation_cuts_what_lies_over_a_row_end(facts: DataFacts) -> None:
    positions = np.concatenate([source.lengths for source in facts.sources]) - 1
    place, cut = 0, 0
    for document in shuffled(len(positions), 0):
        rows = {p // 64 for p in range(place, place + int(positions[document]))}
        cut += len(rows) > 1
        place += int(positions[document])
    assert facts.cut_concatenated == cut > facts.cut_best_fit


def test_words_and_tokens(
    facts: DataFacts, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = most_split_words(tokenizer, facts)
    text = " ".join(text for texts in TEXTS.values() for text in texts)
    counts = Counter(word for word in re.split(r"\W+", text) if len(word) > 1)
    sizes = {word: len(tokenizer.encode(word)) for word, count in counts.items() if count > 1}
    best = sorted(sizes, key=lambda word: (-sizes[word], word))[:20]
    assert words == [(word, sizes[word], counts[word]) for word in best]
    ids = [i for source in facts.sources for document in source.sample for i in document]
    monkeypatch.setattr("trainer.report.data_facts._LISTED", 512)
    longest = [row for row in longest_tokens(tokenizer, facts) if row[1] > 1]
    texts = [tokenizer.decode([i]) for i in ids]
    assert [size for _, size, _ in longest] == sorted((len(t) for t, _, _ in longest), reverse=True)
    assert all((size, n) == (len(text), texts.count(text)) for text, size, n in longest)
    assert sum(n for _, _, n in longest) > 0


def test_page_shows_samples_and_escapes_text(
    config: DataConfig, facts: DataFacts, tokenizer: Tokenizer
) -> None:
    page = render(Loader(config, 1), tokenizer, facts)
    tags: list[str] = []

    class Samples(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            assert not {"src", "href"} & set(dict(attributes)) or tag == "use"

    Samples().feed(page)
    assert "<b>An" not in page and "An & entity" not in page
    lengths = [row for batch in Loader(config, 1).at(0) for row in batch.lengths]
    lengths = sorted(lengths, key=len, reverse=True)[:3]
    assert page.count("<span class=s") == sum(map(len, lengths))
    assert tags.count("script") == 0 and tags.count("svg") == 1
    assert page.count("<b>&lt;｜begin▁of▁sentence｜&gt;</b>") > 0
    assert Path(config.shards).name in page


def test_page_shows_filters_and_the_measured_mixture(
    config: DataConfig, facts: DataFacts, tokenizer: Tokenizer
) -> None:
    data = DataConfig.model_validate(
        config.model_dump()
        | {"source_weights": {"a": 3.0, "b": 1.0}}
        | {
            "transforms": {
                "fim_rate": 0.25,
                "fim_domains": ["prose"],
                "punctuation_split_rate": 0.5,
            }
        }
    )
    loader = Loader(data, 1)
    page = render(loader, tokenizer, facts)
    for source in "ab":
        assert f"{source}, length: 7 characters</p><pre class=row>tiny&lt;i&gt;</pre>" in page
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    audit = measured_mixture(loader)
    (row,) = [row for row in cells if row[:2] == ["a", "75.000%"]]
    counted = audit.sources["a"]
    assert row[2:] == [
        f"{counted.tokens / audit.tokens:.3%}",
        f"{audit.max_deviation['a']:.3%}",
        "25.00%",
        f"{counted.fim / counted.documents:.2%}",
        "50.00%",
        f"{counted.split / counted.splittable:.2%}",
    ]
    assert abs(counted.tokens / audit.tokens - 0.75) < 0.02


def test_a_run_with_phases_shows_its_first(config: DataConfig) -> None:
    """Its row length, ramp and weights, and no step of the second."""
    ramp = {"global_batch_size": 8, "initial_batch_size": 2, "rampup_tokens": 256}
    weights = {"a": 0.6, "b": 0.4}
    phases = [
        {"until_tokens": 640, "attention": "dense", "seq_len": 32, "source_weights": weights}
        | ramp,
        {"until_tokens": 2000, "attention": "dense", "seq_len": 128},
    ]
    fields = yaml.safe_load(TINY.format(folder=Path(config.shards).parent))
    fields["model"]["vocab_size"] = config.tokenizer.vocab_size
    fields |= {"data": config.model_dump(), "phases": phases, "steps": 0}
    run = RunConfig.model_validate(fields)
    page = write_data_report(run).read_text()
    rows = [phase.rows for phase in run.recipe.phases]
    loader = Loader(config, run.seed, phases=rows)
    steps = rows[0].steps or 0
    tokens = sum(n for s in range(steps) for b in loader.at(s) for row in b.lengths for n in row)
    assert f"Counted in the {tokens:,} tokens of the first {steps} steps" in page
    assert "rows of 32 tokens" in page and "<td>60.000%</td>" in page
    shown = sorted((row for b in loader.at(0) for row in b.lengths), key=len)[-3:]
    assert page.count("<span class=s") == sum(map(len, shown))
