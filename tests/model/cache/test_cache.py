"""Cached steps against one forward pass over the whole sequence, which keeps nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model import V4Model
from model.cache import CachedModel
from model.cache import rows as cache_rows
from model.cache.rows import PackedIndexKeys, PackedKV, Rows
from model.cache.sizes import cache_bytes
from model.qat import fake_quantised
from tests.model.tiny import (
    random_model,
    random_tokens,
    relative_error,
    tiny_config,
    transformers_twin,
)

LENGTH = 340
RTOL = 1e-5
"""Of the largest logit: the two differ in the order of fp32 sums alone."""


@pytest.fixture(scope="module")
def model() -> V4Model:
    """All kinds of layers, hashed and learned routers, fewer selected entries than there are."""
    return random_model(tiny_config(index_head_dim=32, moe_intermediate_size=32))


@pytest.fixture(scope="module")
def tokens(model: V4Model) -> Tensor:
    return random_tokens(model.config, 1, LENGTH)[0]


@pytest.fixture(scope="module")
def whole(model: V4Model, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(tokens[None]).logits
    assert logits is not None
    return logits[0]


def assert_same(logits: Tensor, expected: Tensor) -> None:
    assert relative_error(logits, expected) < RTOL


def batches(prompts: range, size: int) -> Iterator[list[int]]:
    """Prompt lengths that lie far apart in one batch."""
    step = -(-len(prompts) // size)
    for first in range(step):
        yield list(prompts[first::step])


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))]
)
def test_every_prompt_length_and_its_continuation(
    model: V4Model, tokens: Tensor, whole: Tensor, first: int
) -> None:
    """Prompts of 1 to 300 tokens, batches of unequal lengths, across all borders."""
    for lengths in list(batches(range(1, 301), 15))[first::4]:
        cached = CachedModel(model, len(lengths), LENGTH)
        prompts = torch.cat([tokens[:n] for n in lengths])
        logits = cached.logits(cached.forward(prompts, lengths))
        assert_same(logits, torch.cat([whole[:n] for n in lengths]))
        ones = [1] * len(lengths)
        for step in range(36):
            position = torch.tensor(lengths) + step
            logits = cached.logits(cached.forward(tokens[position], ones))
            assert_same(logits, whole[position])


@pytest.mark.parametrize("chunk", (1, 2, 3, 7, 8, 16, 50))
def test_prefill_in_chunks(model: V4Model, tokens: Tensor, whole: Tensor, chunk: int) -> None:
    cached = CachedModel(model, 1, LENGTH)
    parts = [cached.logits(cached.forward(p, [len(p)])) for p in tokens[:200].split(chunk)]
    assert_same(torch.cat(parts), whole[:200])


def test_sequences_that_pause(model: V4Model, tokens: Tensor, whole: Tensor) -> None:
    """New tokens of some sequences only, in numbers that differ."""
    cached = CachedModel(model, 3, LENGTH)
    counts = torch.tensor([5, 40, 0])
    generator = torch.Generator().manual_seed(0)
    done = torch.zeros(3, dtype=torch.long)
    for _ in range(20):
        new = torch.cat([tokens[d : d + n] for d, n in zip(done, counts, strict=True)])
        logits = cached.logits(cached.forward(new, counts.tolist()))
        expected = [whole[d : d + n] for d, n in zip(done, counts, strict=True)]
        assert_same(logits, torch.cat(expected))
        done += counts
        counts = torch.randint(0, 12, (3,), generator=generator)
        counts[0] = 1


def test_a_token_that_is_taken_back(model: V4Model, tokens: Tensor, whole: Tensor) -> None:
    """At every position, a wrong second token is replaced: no border keeps any of it."""
    cached = CachedModel(model, 2, LENGTH)
    wrong = (tokens + 1) % model.config.vocab_size
    for position in range(120):
        new = torch.stack([tokens[position], wrong[position + 1], tokens[position]])
        logits = cached.logits(cached.forward(new, [2, 1]))
        assert_same(logits[[0, 2]], whole[[position, position]])
        cached.cache.take_back([1, 0])


def test_drafts_of_the_mtp_block(model: V4Model, tokens: Tensor) -> None:
    cached = CachedModel(model, 1, LENGTH)
    mtp = model.mtp_block
    assert mtp is not None
    with torch.no_grad():
        micro = model.microbatch(tokens[None])
        streams, _ = model.run_blocks(model.embed_streams(micro), micro, model.layers)
        hidden, _ = mtp.predict_hidden(
            streams, model.embed(micro.next_T), micro.next_T, micro.positions, micro.exchange, 1.0
        )
        expected = model.head(hidden)
    parts = []
    for first in range(0, 99, 9):
        streams = cached.forward(tokens[first : first + 9], [9])
        hidden = cached.draft_hidden(streams, tokens[first + 1 : first + 10], [9])
        parts.append(cached.draft_logits(hidden))
    assert_same(torch.cat(parts), expected[:99])


def test_packed_rows_hold_what_quantised_training_rounds(model: V4Model, tokens: Tensor) -> None:
    """FP8 and MXFP4 rows give the same bits as rows in the model's precision."""
    results = []
    with fake_quantised(model):
        for packed in (False, True):
            cached = CachedModel(model, 1, LENGTH, packed=packed)
            parts = [cached.logits(cached.forward(p, [len(p)])) for p in tokens.split(13)]
            results.append(torch.cat(parts))
        with torch.no_grad():
            whole = model(tokens[None]).logits
    assert torch.equal(*results)
    assert whole is not None
    assert_same(results[0], whole[0])


def test_only_rows_that_are_attended_to_are_unpacked(
    model: V4Model, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[tuple[type, int]] = []

    def counted(rows: Rows, table_NX: Tensor, needed: Tensor) -> Tensor:
        counts.append((type(rows), len(needed)))
        return unpack(rows, table_NX.fill_(math.nan), needed)

    unpack = cache_rows._unpack
    monkeypatch.setattr(cache_rows, "_unpack", counted)
    results = []
    with fake_quantised(model):
        for packed in (False, True):
            cached = CachedModel(model, 3, LENGTH, packed=packed)
            cached.forward(tokens[:230], [120, 100, 10])
            counts.clear()
            results.append(cached.logits(cached.forward(tokens[230:232], [1, 1, 0])))
    assert torch.equal(*results)
    config = model.config
    ratios = config.csa_compress_ratio, config.hca_compress_ratio
    csa, hca = (121 // ratio + 101 // ratio for ratio in ratios)
    assert 2 * config.index_topk < hca < csa
    assert max(count for kind, count in counts if kind is PackedKV) == hca
    assert {count for kind, count in counts if kind is PackedIndexKeys} == {csa}


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("max_tokens", (20, LENGTH))
def test_bytes_are_those_of_the_formula(model: V4Model, packed: bool, max_tokens: int) -> None:
    """With and without keys of the indexer, which a short cache does not need."""
    cached = CachedModel(model, 3, max_tokens, packed=packed)
    sizes = cache_bytes(model.config, max_tokens, torch.float32.itemsize, packed)
    expected = {part: 3 * size for part, size in sizes.items()}
    assert cached.cache.bytes_by_part() == expected
    assert ("csa", "index keys") in sizes or max_tokens == 20


def test_too_many_tokens(model: V4Model, tokens: Tensor) -> None:
    cached = CachedModel(model, 2, 20)
    cached.forward(tokens[:25], [20, 5])
    with pytest.raises(ValueError, match="would have 21 tokens, but the cache holds 20"):
        cached.forward(tokens[:1], [1, 0])
    with pytest.raises(ValueError, match="0 or more"):
        cached.forward(tokens[:0], [0, 0])


@pytest.mark.parametrize("length", [1, 7, 40, 131])
def test_logits_are_those_of_transformers_cache(
    model: V4Model, tokens: Tensor, length: int
) -> None:
    """Of a prompt's last token and of those after it, one by one, over the borders of windows."""
    twin = transformers_twin(model).eval()
    cached = CachedModel(model, 1, length + 40)
    past = None
    for start, end in [(0, length), *((n, n + 1) for n in range(length, length + 36))]:
        part = tokens[start:end]
        ours = cached.logits(cached.forward(part, [len(part)]))
        with torch.no_grad():
            output = twin(part[None], past_key_values=past, use_cache=True)
        past = output.past_key_values
        assert_same(ours[-1], output.logits[0, -1])
