"""Samples of a model in training: the prompts of `evaluation`, continued by all ranks together."""

from __future__ import annotations

from collections.abc import Callable

from data import Tokenizer
from model import V4Model
from trainer.config import ConfigError, Phase, RunConfig
from trainer.generate.generate import Generation, Request, attention_of, prompt_ids
from trainer.generate.ranks import Ranks
from trainer.generate.sampling import Sampling
from trainer.parallel.grid import Grid


def encode_prompts(config: RunConfig, tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the ids of `evaluation.prompts`.

    Raises ConfigError for a prompt that is too long for the model with `prompt_tokens` more.
    """
    longest, new = config.model.max_position_embeddings, config.evaluation.prompt_tokens
    ids = [prompt_ids(tokenizer, text) for text in config.evaluation.prompts]
    for number, tokens in enumerate(ids):
        if len(tokens) + new > longest:
            raise ConfigError(
                f"evaluation.prompts.{number} has {len(tokens):,} tokens, and with "
                f"evaluation.prompt_tokens = {new:,} exceeds model.max_position_embeddings = "
                f"{longest:,}"
            )
    return ids


def continue_prompts(
    config: RunConfig,
    model: V4Model,
    phase: Phase,
    tokenizer: Tokenizer,
    grid: Grid,
    check_stop: Callable[[], None],
    beat: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Returns the most likely continuation of each of `evaluation.prompts`.

    Every rank calls it, inside the context with the weights that its forward uses. It calls
    `beat` after every token, and between tokens `check_stop`, which may raise.
    """
    ids = encode_prompts(config, tokenizer)
    request = Request(
        ids,
        config.evaluation.prompt_tokens,
        Sampling(temperature=0),
        frozenset({tokenizer.eos_id}),
        speculative=True,
    )
    tokens: list[list[int]] = [[] for _ in ids]
    generation = Generation(model, request, Ranks(grid), attention_of(phase.attention))
    for number, (index, token) in enumerate(generation):
        if number % len(ids) == 0:
            check_stop()
        tokens[index].append(token)
        beat()
    return {
        prompt: tokenizer.decode([t for t in some if t != tokenizer.eos_id])
        for prompt, some in zip(config.evaluation.prompts, tokens, strict=True)
    }
