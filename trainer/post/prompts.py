"""The prompts of a run that trains on its own samples, and which of them a rollout asks.

A function of the seed and the step: every domain gives the same number of prompts to each rollout,
and goes through its file in a new order in every epoch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import DataError, Tokenizer
from data.text import encode, read_messages
from data.text.messages import Effort
from trainer.config import ConfigError, RunConfig
from trainer.config.post import DomainConfig, PostConfig

_ORDER, _EFFORT, _DRAWS = 1, 2, 3  # purposes of random numbers


@dataclass(frozen=True)
class Prompt:
    """A question to the model.

    Attributes:
        domain: number of its domain in the config.
        line: its line in the domain's file, from 0.
        effort: its mode of thinking.
        ids: its tokens; an answer follows them.
        record: the line's object, for the checker.
    """

    domain: int
    line: int
    effort: Effort
    ids: tuple[int, ...]
    record: Mapping[str, Any]


class Prompts:
    """The prompts of all domains.

    Raises ConfigError for a file that cannot be read or has a line that is no prompt, and for a
    prompt that does not fit a row together with an answer; each names the line.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer) -> None:
        assert config.post is not None
        self._seed, self._post = config.seed, config.post
        room = min(phase.rows.seq_len for phase in config.recipe.phases)
        self._room = room - config.post.max_new_tokens
        self._efforts = [effort for effort, weight in config.post.efforts.items() if weight]
        weights = np.array([config.post.efforts[effort] for effort in self._efforts])
        self._shares = weights / weights.sum()
        self._domains = [
            self._read(number, domain, tokenizer)
            for number, domain in enumerate(config.post.domains)
        ]
        self.counts = counts_by_domain(config.post)

    def of_rollout(self, step: int) -> list[Prompt]:
        """Returns the prompts of the rollout that begins at a step, by domain."""
        rollout = step // self._post.steps_per_rollout
        prompts = []
        for number, count in enumerate(self.counts):
            lines, total = self._domains[number], len(self._domains[number])
            for place in range(rollout * count, (rollout + 1) * count):
                epoch, position = divmod(place, total)
                line = int(self._random(_ORDER, number, epoch).permutation(total)[position])
                draw = self._random(_EFFORT, number, place)
                effort = self._efforts[int(draw.choice(len(self._efforts), p=self._shares))]
                record, by_effort = lines[line]
                prompts.append(Prompt(number, line, effort, by_effort[effort], record))
        return prompts

    def uniforms(self, step: int, prompt: int, sample: int) -> NDArray[np.float64]:
        """Returns the random numbers by which a sample's tokens are drawn, one for each."""
        return self._random(_DRAWS, step, prompt, sample).random(self._post.max_new_tokens)

    def epochs_of(self, step: int) -> dict[str, float]:
        """Returns how often the steps before `step` have asked each domain's prompts, by name."""
        rollouts = -(-step // self._post.steps_per_rollout)
        return {
            domain.name: rollouts * count / len(lines)
            for domain, count, lines in zip(
                self._post.domains, self.counts, self._domains, strict=True
            )
        }

    def _random(self, *purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self._seed, *purpose]))

    def _read(
        self, number: int, domain: DomainConfig, tokenizer: Tokenizer
    ) -> list[tuple[dict[str, Any], dict[Effort, tuple[int, ...]]]]:
        prompts = []
        for line, record in _records(domain.prompts, f"post.domains.{number}.prompts"):
            where = f"{domain.prompts}, line {line + 1}"
            by_effort = {
                effort: tuple(_ids(record, effort, tokenizer, where)) for effort in self._efforts
            }
            longest = max(map(len, by_effort.values()))
            if longest > self._room:
                raise ConfigError(
                    f"{where}: the prompt has {longest:,} tokens, and a row has room for "
                    f"{self._room:,} beside post.max_new_tokens = {self._post.max_new_tokens:,}"
                )
            prompts.append((record, by_effort))
        if not prompts:
            raise ConfigError(f"{domain.prompts}: has no prompts, one JSON object on each line")
        return prompts


def counts_by_domain(post: PostConfig) -> list[int]:
    """Returns the number of prompts of a rollout by domain: by weight, largest remainders first.

    Raises ConfigError where a domain with a weight would have none.
    """
    weights = np.array([domain.weight for domain in post.domains])
    exact = post.prompts_per_step * weights / weights.sum()
    counts = np.floor(exact).astype(int)
    largest = np.argsort(counts - exact, kind="stable")
    counts[largest[: post.prompts_per_step - counts.sum()]] += 1
    for domain, count in zip(post.domains, counts, strict=True):
        if domain.weight and not count:
            raise ConfigError(
                f"post.prompts_per_step = {post.prompts_per_step} leaves no prompt for the domain "
                f"{domain.name} with weight {domain.weight:g}; use more prompts or another weight"
            )
    return [int(count) for count in counts]


def _records(path: str, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise ConfigError(f"{key} = {path}: {reason}") from None
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise ConfigError(f"{path}, line {number + 1}: is not JSON") from None
        if not isinstance(record, dict):
            raise ConfigError(f"{path}, line {number + 1}: is no JSON object")
        yield number, record


def _ids(record: Mapping[str, Any], effort: Effort, tokenizer: Tokenizer, where: str) -> list[int]:
    if isinstance(text := record.get("prompt"), str):
        ids = tokenizer.encode(text)
    elif "messages" in record:
        try:
            conversation = read_messages(record["messages"], effort)
        except DataError as error:
            raise ConfigError(f"{where}: {error}") from None
        if conversation.is_answered:
            raise ConfigError(f"{where}: its last message is an answer; it should be a question")
        ids = encode(conversation, tokenizer)
    else:
        raise ConfigError(f"{where}: has neither messages nor prompt, a text")
    return [tokenizer.bos_id, *ids]
