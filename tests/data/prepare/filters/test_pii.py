"""E-mail and IP addresses: what is found, what is not, and that all passes see the masked text."""

import json
import random
import time
from pathlib import Path

import pytest

from data.config import DataConfig, FiltersConfig, SourceConfig
from data.indexed import open_shard
from data.prepare.corpus import Document
from data.prepare.filters import Masker
from data.prepare.filters.pii import E_MAIL, IPV4, IPV6, contents, masked
from data.prepare.run import prepare
from data.prepare.splits import is_validation
from data.text import Special, Tokenizer
from tests.data.prepare.filters.made import words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mail jo.doe+x@mail.example-site.co.uk.", f"Mail {E_MAIL}."),
        ("<a href=mailto:jo@site.org>jo@site.org</a>", f"<a href=mailto:{E_MAIL}>{E_MAIL}</a>"),
        ("連絡先jo@site.jpまで", f"連絡先{E_MAIL}まで"),
        ("a@site.org,b@site.org", f"{E_MAIL},{E_MAIL}"),
        ("email@example.com, a@b.example, x@localhost", None),
        ("react@18.2.0 @decorator user@host @ site.org", None),
        ("from 8.8.8.8:53 and (9.9.9.9), 地址8.8.4.4", f"from {IPV4}:53 and ({IPV4}), 地址{IPV4}"),
        ("8.8.8.8-8.8.4.4.", f"{IPV4}-{IPV4}."),
        ("10.0.0.1 192.168.1.2 127.0.0.1 172.16.0.9 169.254.1.1 192.0.2.7 224.0.0.1", None),
        ("1.2.3.4.5 v1.2.3.4 pkg-1.2.3.4 256.8.8.8 8.8.8.888 08.8.8.8 8.8.8.8th", None),
        ("2001:4860:4860::8888, [2a00:1450:4001:81b::200e]:443", f"{IPV6}, [{IPV6}]:443"),
        ("fe80::1 fd00::2 ::1 2001:db8::7 std::string 12:30:45 20:01:48:60:48:88", None),
    ],
)
def test_what_is_an_address(text: str, expected: str | None) -> None:
    result = masked(text)
    assert result == (text if expected is None else expected)
    assert masked(result) == result
    assert (contents(text) is None) == (expected is None)


def test_a_long_run_of_letters_takes_linear_time() -> None:
    start = time.perf_counter()
    masked("a-a/" * 500_000 + "@" + "a-" * 500_000 + "1." * 500_000)
    assert time.perf_counter() - start < 5


def test_special_tokens_of_conversations_stay() -> None:
    source = SourceConfig(name="s", paths=("x",))
    masker = Masker(FiltersConfig(pii="mask"), source)
    segments = (Special("<｜User｜>"), "I am jo@site.org")
    document = masker.masked(Document("".join(segments), segments))
    assert document.segments == (Special("<｜User｜>"), f"I am {E_MAIL}")
    assert isinstance(document.segments[0], Special)
    assert document.text == f"<｜User｜>I am {E_MAIL}"
    code = Masker(FiltersConfig(pii="mask"), source.model_copy(update={"domain": "code"}))
    assert code.masked(Document("jo@site.org")) == Document("jo@site.org")


@pytest.fixture
def with_addresses(config: DataConfig, tmp_path: Path) -> DataConfig:
    """Pairs of texts that differ in an address alone, and texts without one."""
    rng = random.Random(5)
    texts = [words(rng, 120) for _ in range(60)]
    for text in texts[:20]:
        texts += [f"By jo{i}@site{rng.randrange(10**6)}.org.\n{text}" for i in range(2)]
    rng.shuffle(texts)
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fields = {"sources": [{"name": "s", "paths": [str(file)]}], "prepare_workers": 1}
    filters = {"near_duplicate_similarity": None, "template_similarity": None}
    fields |= {"filters": filters, "shards": str(tmp_path / "shards"), "validation_fraction": 0.3}
    return DataConfig.model_validate(config.model_dump() | fields)


def test_masked_text_is_what_is_compared_split_and_tokenised(with_addresses: DataConfig) -> None:
    filters = with_addresses.filters
    assert filters is not None
    filters = filters.model_copy(update={"pii": "mask"})
    config = with_addresses.model_copy(update={"filters": filters})
    manifest = prepare(config, progress=False)
    assert manifest.dropped["s"]["exact"].documents == 20  # of each pair, which is equal now
    stats = manifest.masked["s"]
    assert stats.documents == 20 and len(stats.examples) == 3
    assert all(E_MAIL in example.text for example in stats.examples)
    assert {example.detail for example in stats.examples} == {"1 e-mail addresses"}
    assert "@site" not in manifest.model_dump_json()
    assert "source 's': masked addresses in 20 documents" in manifest.skipped()
    tokenizer = Tokenizer(config.tokenizer.path)
    for shard in manifest.shards:
        path = Path(config.shards) / manifest.folder / shard.name
        for ids in open_shard(path, shard.documents, shard.tokens):
            text = tokenizer.decode(ids[1:-1].tolist())
            assert "@site" not in text
            assert is_validation(config.sources[0], text, 0.3) == (shard.split == "validation")


def test_dropped_documents_are_shown_masked(with_addresses: DataConfig) -> None:
    filters = FiltersConfig(pii="drop", max_characters=10**6)
    config = with_addresses.model_copy(update={"filters": filters})
    manifest = prepare(config, progress=False)
    assert manifest.dropped["s"]["pii"].documents == 40 and manifest.masked == {}
    assert "@site" not in manifest.model_dump_json()
    short = config.model_copy(update={"filters": FiltersConfig(pii="drop", max_characters=860)})
    manifest = prepare(short, progress=False, overwrite=True)
    examples = manifest.dropped["s"]["length"].examples
    assert any(E_MAIL in example.text for example in examples)
    assert "@site" not in manifest.model_dump_json()
