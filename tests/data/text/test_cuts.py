"""Long texts in parts have the ids of the whole."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data.text import cuts
from data.text.special_tokens import BOS, EOS
from data.text.tokenizer import Tokenizer

DIGITS = tokenizers.Regex(r"\p{N}{1,3}")
WORDS = tokenizers.Regex(r" ?\p{L}+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_PART", 64), ("_WINDOW", 64), ("_TRIES", 16)):
        monkeypatch.setattr(cuts, name, value)


def byte_level(texts: list[str], folder: Path, **parts: Any) -> Tokenizer:
    """A tokenizer with words of its own, as released ones have."""
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(DIGITS, "isolated"),
            pre_tokenizers.Split(WORDS, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    for name, value in parts.items():
        setattr(engine, name, value)
    engine.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def check(tokenizer: Tokenizer, texts: list[str]) -> int:
    """All ids agree; returns the number of parts."""
    for text, ids in zip(texts, tokenizer.encode_parts(texts), strict=True):
        assert np.concatenate(ids).tolist() == tokenizer.encode(text)
    parts = [list(tokenizer._cuts.parts(text)) for text in texts]
    assert ["".join(p) for p in parts] == texts
    return sum(map(len, parts))


@pytest.fixture
def texts(documents: list[str], any_text: Callable[[random.Random], str]) -> list[str]:
    rng = random.Random(5)
    odd = ["".join(any_text(rng) for _ in range(20)) for _ in range(20)]
    runs = ["=" * 1000, " " * 999 + "x", "a" * 2000, "ab\n" * 500, "\n \n" * 300, "1" * 777, ""]
    return [*(text[:5000] for text in documents[:12]), *odd, *runs]


def test_without_words(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert check(tokenizer, texts) > 10 * len(texts)


def test_with_words(texts: list[str], tmp_path: Path) -> None:
    assert check(byte_level(texts, tmp_path), texts) > 10 * len(texts)


def test_what_could_change_ids_is_not_cut(texts: list[str], tmp_path: Path) -> None:
    for parts in (
        {"normalizer": normalizers.NFC()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.Metaspace()},
    ):
        assert check(byte_level(texts, tmp_path, **parts), texts) == len(texts)


def test_memory_does_not_grow_with_a_text(
    tokenizer: Tokenizer, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own is that of a batch: about a hundred bytes for each character."""
    sizes: list[int] = []

    def encode_batch(texts: list[str]) -> list[list[int]]:
        sizes.append(sum(map(len, texts)))
        return [[0]] * len(texts)

    monkeypatch.setattr(tokenizer, "encode_batch", encode_batch)
    text = "".join(documents) * 10
    assert sum(len(ids) for ids in tokenizer.encode_parts([text, "short"])) > len(text) / 128
    assert sum(sizes) == len(text) + len("short")
    assert max(sizes) < 2**20 + 1024 < len(text) / 2
