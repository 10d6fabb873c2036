"""Texts of a tiny model: with drafts as without, and as from logits over whole sequences."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

import trainer.generate.generate as module
from model import V4Model
from model.cache import CachedModel
from tests.model.tiny import random_model, tiny_config, transformers_twin
from trainer.config import ConfigError
from trainer.generate import Generation, Request, Sampling
from trainer.generate.sampling import accept_drafts, draw, probabilities
from trainer.process.errors import ExportError

GREEDY = Sampling(temperature=0)
PROMPTS = [[5, 9, 20, 31], [7], list(range(3, 60)), [44, 8]]


@pytest.fixture(scope="module")
def model() -> V4Model:
    return random_model(tiny_config()).eval()


def texts(model: V4Model, request: Request) -> list[list[int]]:
    results: list[list[int]] = [[] for _ in request.prompts]
    for index, token in Generation(model, request):
        results[index].append(token)
    return results


def greedy_without_cache(model: V4Model, prompt: list[int], new: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            logits = model(torch.tensor([tokens])).logits
            assert logits is not None
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("speculative", (False, True))
def test_greedy_text_is_that_of_whole_sequences(model: V4Model, speculative: bool) -> None:
    request = Request(PROMPTS, 30, GREEDY, speculative=speculative)
    expected = [greedy_without_cache(model, prompt, 30) for prompt in PROMPTS]
    assert texts(model, request) == expected


def test_greedy_text_is_that_of_transformers_cache(model: V4Model) -> None:
    twin = transformers_twin(model).eval()
    for prompt in PROMPTS:
        with torch.no_grad():
            output = twin.generate(
                torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None
            )
        expected = output[0, len(prompt) :].tolist()
        assert texts(model, Request([prompt], 30, GREEDY)) == [expected]


def test_drafts_are_counted_and_some_are_accepted(model: V4Model) -> None:
    """A random MTP block drafts badly, but wide distributions let some drafts pass."""
    generation = Generation(model, Request(PROMPTS, 40, Sampling(), speculative=True))
    tokens = Counter(index for index, _ in generation)
    statistics = generation.statistics
    assert tokens == Counter(dict.fromkeys(range(4), 40))
    assert statistics.new_tokens == 160 and statistics.prompt_tokens == sum(map(len, PROMPTS))
    assert 0 < statistics.accepted_drafts < statistics.drafts


def test_a_text_ends_at_a_stop_token(model: V4Model) -> None:
    whole = texts(model, Request(PROMPTS, 30, GREEDY))
    stop = whole[0][7]
    for speculative in (False, True):
        request = Request(PROMPTS, 30, GREEDY, frozenset({stop}), speculative=speculative)
        for text, full in zip(texts(model, request), whole, strict=True):
            length = full.index(stop) + 1 if stop in full else 30
            assert text == full[:length]


@pytest.mark.parametrize(("sequences", "memory"), [(3, 1 << 30), (64, 1)])
def test_prompts_beyond_the_limits_wait(
    model: V4Model, monkeypatch: pytest.MonkeyPatch, sequences: int, memory: int
) -> None:
    """Groups of at most 3, and of one each: the same text in the same order."""
    whole = texts(model, Request(PROMPTS, 12, GREEDY, speculative=True))
    monkeypatch.setattr(module, "MAX_SEQUENCES", sequences)
    monkeypatch.setattr(module, "MAX_CACHE_BYTES", memory)
    made: list[tuple[int, int]] = []

    def made_for(model: V4Model, count: int, tokens: int, *others: Any) -> CachedModel:
        made.append((count, tokens))
        return CachedModel(model, count, tokens, *others)

    monkeypatch.setattr(module, "CachedModel", made_for)
    generation = Generation(model, Request(PROMPTS, 12, GREEDY, speculative=True))
    results: list[list[int]] = [[] for _ in PROMPTS]
    for index, token in generation:
        results[index].append(token)
    assert results == whole
    assert generation.statistics.prompt_tokens == sum(map(len, PROMPTS))
    assert made == ([(3, 70), (1, 15)] if memory > 1 else [(1, len(p) + 13) for p in PROMPTS])


def test_prompts_with_tokens_left_share_a_pass(
    model: V4Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the output head sees the last token of a prompt alone, with drafts as well."""
    monkeypatch.setattr(module, "PREFILL_TOKENS", 16)
    passes: list[list[int]] = []
    heads: list[int] = []
    forward, head = CachedModel.forward, model.head.forward

    def forward_of(self: CachedModel, tokens: torch.Tensor, new: list[int]) -> torch.Tensor:
        passes.append(new)
        return forward(self, tokens, new)

    def head_of(x: torch.Tensor) -> torch.Tensor:
        heads.append(len(x))
        return head(x)

    monkeypatch.setattr(CachedModel, "forward", forward_of)
    monkeypatch.setattr(model.head, "forward", head_of)
    generation = Generation(model, Request(PROMPTS, 1, GREEDY, speculative=True))
    assert len(list(generation)) == 4
    assert passes == [[4, 1, 4, 2], [0, 0, 16, 0], [0, 0, 16, 0], [0, 0, 16, 0], [0, 0, 5, 0]]
    assert heads == [4]
    assert generation.statistics.tokens_per_second == 0  # nothing was decoded


def test_the_speed_is_that_of_decoding(model: V4Model) -> None:
    generation = Generation(model, Request(PROMPTS, 5, GREEDY))
    assert len(list(generation)) == 20
    statistics = generation.statistics
    assert statistics.decoded_tokens == 16 and statistics.new_tokens == 20
    assert statistics.tokens_per_second == 16 / statistics.decode_seconds


def test_the_seed_decides_the_text(model: V4Model) -> None:
    first, again, other = (
        texts(model, Request(PROMPTS, 20, Sampling(), seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_top_p_keeps_the_fewest_tokens() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    half = probabilities(logits, Sampling(top_p=0.5))
    assert torch.allclose(half, torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7]]))
    assert torch.allclose(
        probabilities(logits, Sampling(top_p=0.4)), torch.tensor([[0.0, 1, 0, 0]])
    )
    cold = probabilities(logits, Sampling(temperature=0.5))
    assert torch.allclose(cold, (2 * logits).softmax(-1))


def test_temperatures_near_zero_and_logits_that_are_not_finite() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for temperature in (1e-6, 1e-38, 1e-40, 1e-300):
        chances = probabilities(logits, Sampling(temperature))
        assert torch.equal(chances, torch.tensor([[0.0, 1.0, 0.0]]))
    for bad in (math.nan, math.inf):
        with pytest.raises(ExportError, match="logits are NaN or infinite"):
            probabilities(logits.index_fill(1, torch.tensor([0]), bad), Sampling())
    for temperature, top_p in ((math.nan, 1.0), (math.inf, 1.0), (-1.0, 1.0), (1.0, math.nan)):
        with pytest.raises(ConfigError, match="it should be"):
            Sampling(temperature, top_p)


def test_accepted_drafts_have_the_distribution_of_the_model() -> None:
    """Chi-square of 100,000 draws; 0.1% of all seeds would exceed the bound."""
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.5, 0.2, 0.05, 0.25, 0.0]).expand(100_000, -1)
    q = torch.tensor([0.1, 0.2, 0.3, 0.0, 0.4]).expand(100_000, -1)
    drafts = draw(q, generator)
    accepted, tokens = accept_drafts(drafts, q, p, generator)
    assert chi_square(tokens, p[0]) < 16.3  # 3 degrees of freedom
    expected = float(torch.minimum(p[0], q[0]).sum())
    assert float(accepted.float().mean()) == pytest.approx(expected, abs=0.01)
    assert torch.equal(tokens[accepted], drafts[accepted])


def chi_square(tokens: torch.Tensor, chances: torch.Tensor) -> float:
    counts = tokens.bincount(minlength=len(chances)).double()
    assert not counts[chances == 0].any()
    expected = chances.double() * len(tokens)
    kept = chances > 0
    return float(((counts - expected)[kept].square() / expected[kept]).sum())


@pytest.mark.slow
def test_speculative_texts_are_distributed_as_plain_ones() -> None:
    """Pairs of the second and the third token, over 4,000 texts of a vocabulary of eight."""
    config = tiny_config(vocab_size=8, pad_token_id=2, num_hash_layers=0)
    model = random_model(config).eval()
    counts = []
    for speculative in (False, True):
        found: Counter[tuple[int, int]] = Counter()
        for seed in range(8):
            request = Request(
                [[5, 3, 7]] * 500, 3, Sampling(temperature=1.5), seed=seed, speculative=speculative
            )
            found.update((text[1], text[2]) for text in texts(model, request))
        counts.append(found)
    plain, drafted = counts
    pairs = [pair for pair in plain | drafted if plain[pair] + drafted[pair] >= 10]
    statistic = sum(
        (plain[pair] - drafted[pair]) ** 2 / (plain[pair] + drafted[pair]) for pair in pairs
    )
    # A chi-square with as many degrees of freedom; 4 standard deviations above its mean.
    assert statistic < len(pairs) + 4 * math.sqrt(2 * len(pairs))
