"""Continues token sequences with a model and its cache, several sequences at a time.

B sequences; T new tokens of all of them; N streams; D hidden size; V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import cast

import torch
from torch import Tensor

from data import Tokenizer
from model import V4Model
from model.cache import CachedModel
from model.cache.sizes import cache_bytes
from model.config import AttentionMode
from trainer.generate.ranks import ALONE, Ranks
from trainer.generate.sampling import Sampling, accept_drafts, draw, draw_at, probabilities

PREFILL_TOKENS = 2048
"""Prompt tokens that pass the model at a time."""
MAX_SEQUENCES = 64
"""Prompts that are continued together; the others wait for them."""
MAX_CACHE_BYTES = 4 << 30
"""Maximum memory of the cache of prompts that are continued together, unless one needs more."""


@dataclass(frozen=True)
class Request:
    """What to continue, and until when.

    Attributes:
        prompts: token ids of each sequence, at least one of them.
        max_new_tokens: of each sequence.
        stop: ids after which a sequence ends.
        speculative: whether the MTP block drafts tokens. The tokens are distributed as without it,
            and the same at temperature 0.
        packed: whether the cache is packed; see model.cache.
        uniforms: fp64 [prompts, max_new_tokens] in [0, 1), by which tokens are drawn in place of
            `seed`, each sequence by its own, whatever is continued with it. Not with drafts.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: frozenset[int] = frozenset()
    seed: int = 0
    speculative: bool = False
    packed: bool = False
    uniforms: Tensor | None = None


def attention_of(trained: AttentionMode) -> AttentionMode:
    """Returns how CSA layers attend in text by a model that was trained with this attention."""
    return "dense" if trained in ("dense", "warmup") else "select"


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns bos and the ids of a prompt; special tokens that are spelled out become tokens.

    A prompt that begins with bos, as a rendered conversation does, gets no second one.
    """
    ids = tokenizer.encode(prompt, allow_special=True)
    return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


@dataclass
class Statistics:
    """Tokens and seconds of a generation, and what became of its drafts."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    decoded_tokens: int = 0
    """New tokens but the first of each sequence, which is prefill's."""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    drafts: int = 0
    accepted_drafts: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens of all sequences per second of decoding; 0 where nothing was decoded."""
        return self.decoded_tokens / self.decode_seconds if self.decoded_tokens else 0.0


@dataclass
class _Sequence:
    """One sequence while it grows.

    Attributes:
        pending: the last token, which has not passed the model yet.
        room: new tokens that it may still get.
    """

    index: int
    pending: int
    room: int
    unseen: list[Tensor] = field(default_factory=list)
    """Streams [1, N, D] of tokens that the MTP block has not seen."""
    following: list[int] = field(default_factory=list)
    """The tokens after these, as far as they are known."""


class Generation:
    """The state of a request; iterating it yields (sequence, token) as they are chosen.

    Attributes:
        statistics: counts up while it is iterated.
        log_probabilities: with `uniforms`, those of each sequence's tokens in the distributions
            that they were drawn from, in nats.
    """

    def __init__(
        self,
        model: V4Model,
        request: Request,
        ranks: Ranks = ALONE,
        attention: AttentionMode = "select",
    ) -> None:
        """Plans which prompts are continued together.

        `ranks` share the model; each of them calls this, and iterates, with the same request.
        `attention` is that of CSA layers, by which they were trained; see `attention_of`.
        """
        self.request, self.statistics, self._ranks = request, Statistics(), ranks
        self._whole, self._attention = model, attention
        self._device = model.head.weight.device
        self._generator = torch.Generator(self._device).manual_seed(request.seed)
        self._drafts = request.speculative and model.mtp_block is not None
        self._ended: set[int] = set()
        assert request.uniforms is None or not request.speculative
        self.log_probabilities: list[list[float]] = [[] for _ in request.prompts]

    def end(self, index: int) -> None:
        """Ends a sequence with the token that was yielded last; on all ranks alike."""
        self._ended.add(index)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for indices in _together(self.request, self._whole):
            yield from self._continue(indices)

    def _continue(self, indices: range) -> Iterator[tuple[int, int]]:
        """Continues some of the prompts with their own cache."""
        prompts = [list(self.request.prompts[index]) for index in indices]
        self._first = indices.start
        self._model = CachedModel(
            self._whole,
            len(prompts),
            _capacity(prompts, self.request),
            self.request.packed,
            self._ranks.exchange,
            self._ranks.gather_logits,
            self._attention,
        )
        start = time.perf_counter()
        last_BND = self._prefill(prompts)
        chances_BV = self._chances(self._model.logits(last_BND))
        first = self._draw_for([*indices], chances_BV)
        self.statistics.prefill_seconds += time.perf_counter() - start
        active = []
        for index, token in enumerate(first):
            room = self.request.max_new_tokens
            sequence = _Sequence(index, token, room, [last_BND[index : index + 1]], [])
            yield from self._yielded(indices[index], sequence, [token])
            if sequence.room:
                active.append(sequence)
        step = self._speculative_step if self._drafts else self._step
        while active:
            start = time.perf_counter()
            results = step(active)
            self.statistics.decode_seconds += time.perf_counter() - start
            for sequence, tokens in zip(active, results, strict=True):
                for pair in self._yielded(indices[sequence.index], sequence, tokens):
                    self.statistics.decoded_tokens += 1
                    yield pair
            active = [sequence for sequence in active if sequence.room]
        del self._model  # before the next prompts get a cache

    def _yielded(
        self, index: int, sequence: _Sequence, tokens: list[int]
    ) -> Iterator[tuple[int, int]]:
        """Appends tokens and yields them with the request's index, until the sequence ends."""
        for token in self._add(sequence, tokens):
            yield index, token
            if index in self._ended:
                sequence.room = 0

    def _add(self, sequence: _Sequence, tokens: list[int]) -> Iterator[int]:
        """Appends tokens until the sequence ends; yields them."""
        for token in tokens:
            if not sequence.room:
                return
            sequence.pending, sequence.room = token, sequence.room - 1
            sequence.following.append(token)
            self.statistics.new_tokens += 1
            if token in self.request.stop:
                sequence.room = 0
            yield token

    def _prefill(self, prompts: list[list[int]]) -> Tensor:
        """Runs the prompts in chunks; returns the streams of each one's last token, [B, N, D]."""
        self.statistics.prompt_tokens += sum(map(len, prompts))
        last: dict[int, Tensor] = {}
        first = [0] * len(prompts)
        while any(left := [len(p) - n for p, n in zip(prompts, first, strict=True)]):
            chunk = max(PREFILL_TOKENS // sum(n > 0 for n in left), 1)
            new = [min(n, chunk) for n in left]
            parts = [p[n : n + chunk] for p, n in zip(prompts, first, strict=True)]
            streams = self._model.forward(self._tensor([*chain(*parts)]), new).split(new)
            for index, part in enumerate(streams):
                if len(part):
                    last[index] = part[-1]
            if self._drafts:
                self._prefill_mtp(prompts, first, streams)
            first = [a + b for a, b in zip(first, new, strict=True)]
        return torch.stack([last[index] for index in range(len(prompts))])

    def _prefill_mtp(
        self, prompts: list[list[int]], first: list[int], streams: Sequence[Tensor]
    ) -> None:
        """Runs the MTP block over a chunk, except for each prompt's last token."""
        following = [
            prompt[start + 1 : start + 1 + len(part)]
            for prompt, start, part in zip(prompts, first, streams, strict=True)
        ]
        new = [len(part) for part in following]
        if sum(new):
            parts = torch.cat([part[:n] for part, n in zip(streams, new, strict=True)])
            self._model.draft_hidden(parts, self._tensor([*chain(*following)]), new)

    def _step(self, active: Sequence[_Sequence]) -> list[list[int]]:
        """Runs each sequence's pending token; returns the next one of each."""
        pending = [sequence.pending for sequence in active]
        streams = self._model.forward(self._tensor(pending), self._counts(active, 1))
        chances = self._chances(self._model.logits(streams))
        tokens = self._draw_for([self._first + sequence.index for sequence in active], chances)
        return [[token] for token in tokens]

    def _speculative_step(self, active: Sequence[_Sequence]) -> list[list[int]]:
        """Drafts a token after the pending one, runs both; returns one or two tokens of each."""
        draft_chances = self._draft(active)
        drafts = self._draw(draft_chances)
        pending = self._tensor([sequence.pending for sequence in active])
        tokens = torch.stack([pending, drafts], dim=1).flatten()
        streams = self._model.forward(tokens, self._counts(active, 2))
        logits = self._model.logits(streams).unflatten(0, (-1, 2))
        accepted, first = accept_drafts(
            drafts, draft_chances, self._chances(logits[:, 0]), self._generator
        )
        second = draw(self._chances(logits[:, 1]), self._generator)
        accepted, first, second = self._ranks.agree(
            torch.stack([accepted.long(), first, second])
        ).unbind()
        refused = [0] * len(self._model.cache.lengths)
        results = []
        pairs = streams.unflatten(0, (-1, 2))
        for number, (sequence, stays) in enumerate(zip(active, accepted.tolist(), strict=True)):
            sequence.unseen = [pairs[number, : 1 + stays]]
            sequence.following = []
            refused[sequence.index] = 1 - stays
            tokens_of_sequence = [int(first[number]), int(second[number])]
            results.append(tokens_of_sequence[: 1 + stays])
        self._model.cache.take_back(refused)
        self.statistics.drafts += len(active)
        self.statistics.accepted_drafts += int(accepted.sum())
        return results

    def _draft(self, active: Sequence[_Sequence]) -> Tensor:
        """Returns the MTP head's distributions of the token after the pending one, [B, V]."""
        counts = [0] * len(self._model.cache.lengths)
        for sequence in active:
            counts[sequence.index] = sum(len(streams) for streams in sequence.unseen)
        streams = torch.cat([part for sequence in active for part in sequence.unseen])
        following = self._tensor([t for sequence in active for t in sequence.following])
        hidden_TD = self._model.draft_hidden(streams, following, counts)
        ends = torch.tensor([counts[sequence.index] for sequence in active]).cumsum(0) - 1
        return self._chances(self._model.draft_logits(hidden_TD[ends.to(self._device)]))

    def _draw_for(self, indices: list[int], chances_BV: Tensor) -> list[int]:
        """Returns the next token of the sequences with these indices in the request."""
        if self.request.uniforms is None:
            return cast(list[int], self._draw(chances_BV).tolist())
        places = [len(self.log_probabilities[index]) for index in indices]
        uniform_B = self.request.uniforms[indices, places].to(self._device)
        tokens_B = self._ranks.agree(draw_at(chances_BV, uniform_B))
        chosen_B = chances_BV.gather(1, tokens_B[:, None])[:, 0].log()
        for index, value in zip(indices, chosen_B.tolist(), strict=True):
            self.log_probabilities[index].append(value)
        return cast(list[int], tokens_B.tolist())

    def _draw(self, chances_BV: Tensor) -> Tensor:
        """Returns the tokens that the first rank draws, int64 [B]."""
        return self._ranks.agree(draw(chances_BV, self._generator))

    def _chances(self, logits: Tensor) -> Tensor:
        return probabilities(logits, self.request.sampling)

    def _counts(self, active: Sequence[_Sequence], count: int) -> list[int]:
        """New tokens of every sequence of the cache: `count` for the active ones."""
        counts = [0] * len(self._model.cache.lengths)
        for sequence in active:
            counts[sequence.index] = count
        return counts

    def _tensor(self, tokens: list[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.int64, device=self._device)


def _together(request: Request, model: V4Model) -> Iterator[range]:
    """Yields the prompts that are continued together, in order: as many as the limits allow."""
    first = 0
    for stop in range(1, len(request.prompts) + 1):
        following = request.prompts[first : stop + 1]
        tokens = _capacity(following, request)
        size = sum(cache_bytes(model.config, tokens, model.dtype.itemsize, request.packed).values())
        is_last = stop == len(request.prompts)
        if is_last or len(following) > MAX_SEQUENCES or len(following) * size > MAX_CACHE_BYTES:
            yield range(first, stop)
            first = stop


def _capacity(prompts: Sequence[Sequence[int]], request: Request) -> int:
    """Returns the number of tokens that the cache of these prompts holds for each."""
    return max(map(len, prompts)) + request.max_new_tokens + 1
