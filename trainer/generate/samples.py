"""Samples of a model in training: the prompts of `evaluation`, continued by all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from data import Tokenizer
from model import V4Model
from trainer.config import Phase
from trainer.generate.generate import Generation, Request, attention_of
from trainer.generate.ranks import Ranks
from trainer.generate.sampling import Sampling
from trainer.parallel.grid import Grid


def continue_prompts(
    prompts: Sequence[str],
    max_new_tokens: int,
    model: V4Model,
    phase: Phase,
    tokenizer: Tokenizer,
    grid: Grid,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Returns the most likely continuation of each prompt; calls `beat` after every token.

    Every rank calls it, inside the context with the weights that its forward uses.
    """
    ids = [[tokenizer.bos_id, *tokenizer.encode(text, allow_special=True)] for text in prompts]
    request = Request(
        ids,
        max_new_tokens,
        Sampling(temperature=0),
        frozenset({tokenizer.eos_id}),
        speculative=True,
    )
    tokens: list[list[int]] = [[] for _ in ids]
    for index, token in Generation(model, request, Ranks(grid), attention_of(phase.attention)):
        tokens[index].append(token)
        beat()
    return {
        prompt: tokenizer.decode([t for t in some if t != tokenizer.eos_id])
        for prompt, some in zip(prompts, tokens, strict=True)
    }
