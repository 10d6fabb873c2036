"""Answers of the model in training to the prompts of a rollout.

Data ranks divide the samples where their experts are not on each other; otherwise all ranks compute
all of them together. The numbers by which tokens are drawn belong to a sample, so that its tokens
are the same, up to rounding, whatever else is sampled with it and on however many ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from model import V4Model
from trainer.config import Phase
from trainer.engine import Engine
from trainer.generate.generate import Generation, Request, attention_of
from trainer.generate.ranks import Ranks, may_divide_data
from trainer.generate.sampling import Sampling
from trainer.parallel.collectives import all_gather_objects
from trainer.parallel.grid import Grid
from trainer.post.answer import Answer, SamplingSettings
from trainer.post.prompts import Prompt, Prompts
from trainer.post.sampling_in_rows import sample_in_rows


def sample_answers(
    engine: Engine,
    prompts: Prompts,
    step: int,
    settings: SamplingSettings,
    phase: Phase,
    grid: Grid,
    beat: Callable[[], None],
) -> list[list[Answer]]:
    """Returns the answers to each prompt of the rollout that begins at `step`, on every rank.

    Every rank calls it. `beat` is called after every token.
    """
    chosen = prompts.of_rollout(step)
    numbers = [(p, k) for p in range(len(chosen)) for k in range(settings.samples_per_prompt)]
    divides = may_divide_data(grid)
    local = numbers[grid.data.rank :: grid.data.size] if divides else numbers
    uniforms = np.array([prompts.uniforms(step, p, k) for p, k in local])
    questions, ranks = [chosen[p] for p, _ in local], Ranks(grid, divides)
    if grid.pipeline.size > 1:
        answers = sample_in_rows(engine, questions, uniforms, settings, phase, ranks, beat)
    else:
        with engine.computing():
            answers = _generate(engine.model, questions, uniforms, settings, phase, ranks, beat)
    by_rank = all_gather_objects(answers, grid.data) if divides else [answers]
    of_number: list[list[Answer]] = [[] for _ in chosen]
    for place, (p, _) in enumerate(numbers):
        rank, index = (place % len(by_rank), place // len(by_rank))
        of_number[p].append(by_rank[rank][index])
    return of_number


def _generate(
    model: V4Model,
    prompts: Sequence[Prompt],
    uniforms: np.ndarray,
    settings: SamplingSettings,
    phase: Phase,
    ranks: Ranks,
    beat: Callable[[], None],
) -> list[Answer]:
    if not prompts:
        return []
    request = Request(
        [prompt.ids for prompt in prompts],
        settings.max_new_tokens,
        Sampling(settings.temperature),
        settings.stop,
        uniforms=torch.from_numpy(uniforms),
    )
    generation = Generation(model, request, ranks, attention_of(phase.attention))
    ids: list[list[int]] = [[] for _ in prompts]
    for index, token in generation:
        ids[index].append(token)
        beat()
    return [
        Answer(tuple(tokens), tuple(values))
        for tokens, values in zip(ids, generation.log_probabilities, strict=True)
    ]
