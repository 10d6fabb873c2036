"""A small real corpus, a tokenizer trained on it and its shards, made once for all data tests."""

import json
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from data.config import DataConfig
from data.prepare.run import prepare
from data.prepare.tokenizer_training import train_tokenizer
from data.text.special_tokens import special_ids
from data.text.tokenizer import Tokenizer

VOCAB_SIZE = 1024


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Source files of the standard library, and short texts that share a row."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted([*folder.glob("asyncio/*.py"), *folder.glob("json/*.py")])
    texts = [file.read_text("utf-8") for file in files]
    return texts + [f"Short text number {i}.\n" * (i % 7 + 1) for i in range(200)]


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> DataConfig:
    """A trained tokenizer and prepared shards of `documents`, one in five for validation."""
    folder = tmp_path_factory.mktemp("data")
    with (folder / "text.jsonl").open("w") as stream:
        for text in documents:
            stream.write(json.dumps({"text": text}) + "\n")
    config = DataConfig.model_validate(
        {
            "sources": [{"name": "text", "paths": [str(folder / "text.jsonl")]}],
            "tokenizer": {"path": str(folder / "tokenizer"), "vocab_size": VOCAB_SIZE},
            "shards": str(folder / "shards"),
            "seq_len": 64,
            "global_batch_size": 12,
            "micro_batch_size": 2,
            "validation_fraction": 0.2,
        }
    )
    train_tokenizer(config)
    prepare(config, progress=False)
    return config


@pytest.fixture(scope="session")
def tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer of `config`."""
    return Tokenizer(config.tokenizer.path)


@pytest.fixture(scope="session")
def any_text() -> Callable[[random.Random], str]:
    """Makes random text from every corner of Unicode, special spellings and nasty fragments."""
    fragments = [
        *("\x00", "\r\n", "\r", "\n\n", "\t", " ", "  ", "    ", "\u00a0", "\u2028", "\ufeff"),
        *("▁", "▁▁", " ▁", "<0x41>", "<unk>", "<s>", "�", "e\u0301", "\u0301", "👩‍👩‍👧", "🇫🇷"),
        *("def f(self):\n", "return", "1234567", "====", "aaaa", "----", "ﬁ", "Å", "x" * 40),
        *special_ids(VOCAB_SIZE),
        *("<｜", "｜>", "<think", "<｜unused▁5｜>", "<｜place▁holder▁no▁3｜>"),
    ]
    planes = [(0x20, 0x7E), (0, 0x2FF), (0, 0xD7FF), (0xE000, 0x10FFFF)]

    def make(rng: random.Random) -> str:
        parts = []
        for _ in range(rng.randrange(24)):
            if rng.random() < 0.5:
                parts.append(rng.choice(fragments))
            else:
                low, high = rng.choice(planes)
                parts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randrange(9))))
        return "".join(parts)

    return make


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the library would cache tables if it did not stream."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder))
    return folder
