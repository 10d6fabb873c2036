"""An answer of the model, and how answers are sampled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """The tokens of an answer, and their log-probabilities when they were drawn, in nats."""

    ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]


@dataclass(frozen=True)
class SamplingSettings:
    """How answers are sampled: how many to a prompt, how long, at which temperature, until what."""

    samples_per_prompt: int
    max_new_tokens: int
    temperature: float
    stop: frozenset[int]
