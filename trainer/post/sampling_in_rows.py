"""Sampling without a cache, by the forward of training, where no process has all layers.

Every token costs a forward pass over all that was written before it, packed in rows as in training:
right at every degree, and slow. n tokens after a prompt of p take n · p + n² / 2 tokens of forward
passes, where the cache takes p + n.

Letters: B rows, S positions of a row, T queries of a rank, D hidden size, V vocabulary, R answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data import Batch
from data.rows import pack
from model import IGNORE_INDEX, V4Model
from model.transformer import Microbatch
from trainer.config import Phase
from trainer.engine import Engine
from trainer.generate.ranks import Ranks
from trainer.generate.sampling import Sampling, draw_at, probabilities
from trainer.parallel.collectives import all_reduce_
from trainer.parallel.grid import Grid
from trainer.post.answer import Answer, SamplingSettings
from trainer.post.prompts import Prompt


def sample_in_rows(
    engine: Engine,
    prompts: Sequence[Prompt],
    uniforms: np.ndarray,
    settings: SamplingSettings,
    phase: Phase,
    ranks: Ranks,
    beat: Callable[[], None],
) -> list[Answer]:
    """Returns an answer to each prompt; `uniforms` [R, max_new_tokens] draw its tokens.

    Every rank calls it, outside of the context with the weights of its forward.
    """
    grid = engine.grid
    texts = [list(prompt.ids) for prompt in prompts]
    values: list[list[float]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    for place in range(settings.max_new_tokens):
        if not active:
            break
        beat()
        drawn_2R = torch.zeros(2, len(texts), dtype=torch.float64, device=grid.device)
        batches, last = _batches(texts, active, phase, engine.model.config.pad_token_id)
        uniform_R = torch.from_numpy(uniforms[:, place]).to(grid.device)
        reader = _Reader(engine.model, ranks, settings.temperature, last, uniform_R, drawn_2R)
        engine.read_streams(batches, reader)
        tokens, log_p = _agree(drawn_2R, grid, ranks.divides_data).tolist()
        for number in active:
            texts[number].append(int(tokens[number]))
            values[number].append(log_p[number])
        active = [number for number in active if texts[number][-1] not in settings.stop]
    return [
        Answer(tuple(text[len(prompt.ids) :]), tuple(of_text))
        for prompt, text, of_text in zip(prompts, texts, values, strict=True)
    ]


def _agree(drawn_2R: Tensor, grid: Grid, divides_data: bool) -> Tensor:
    """Returns the draws of the ranks that have an answer's last position, on all ranks."""
    if not grid.tensor.is_first:  # each tensor rank draws the same
        drawn_2R.zero_()
    all_reduce_(drawn_2R, grid.sequence)
    all_reduce_(drawn_2R, grid.pipeline)
    if not divides_data and grid.data.group is not None:  # rounding may differ between them
        dist.broadcast(drawn_2R, src=grid.data.ranks[0], group=grid.data.group)
    return drawn_2R


def _batches(
    texts: Sequence[Sequence[int]], active: Sequence[int], phase: Phase, pad: int
) -> tuple[list[Batch], list[Tensor]]:
    """Packs the active texts; returns for each microbatch which of them ends where, [B, S].

    A position that ends the text n has n + 1, every other one 0.
    """
    seq_len, size = phase.rows.seq_len, phase.rows.micro_batch_size
    packed = pack(np.array([len(texts[number]) for number in active]), seq_len)
    count = -(-len(packed) // size) * size
    tokens = np.full((count, seq_len), pad, dtype=np.int64)
    ends = np.zeros((count, seq_len), dtype=np.int64)
    lengths: list[list[int]] = [[] for _ in range(count)]
    for row in range(len(packed)):
        end = 0
        for place, _, length in packed.row(row):
            start, end = end, end + length
            tokens[row, start:end] = texts[active[place]]
            ends[row, end - 1] = active[place] + 1
            lengths[row].append(length)
    tokens_RS, ends_RS = torch.from_numpy(tokens), torch.from_numpy(ends)
    targets_RS = torch.full_like(tokens_RS, IGNORE_INDEX)
    parts = [slice(first, first + size) for first in range(0, count, size)]
    batches = [Batch(tokens_RS[part], targets_RS[part], lengths[part]) for part in parts]
    return batches, [ends_RS[part] for part in parts]


@dataclass(frozen=True)
class _Reader:
    """Draws a token after the last position of each text, into `drawn_2R`, with its log p."""

    model: V4Model
    ranks: Ranks
    temperature: float
    ends: Sequence[Tensor]
    uniform_R: Tensor
    drawn_2R: Tensor

    def __call__(self, streams_TND: Tensor, micro: Microbatch, index: int) -> None:
        model, device = self.model, self.drawn_2R.device
        hidden_TD = micro.exchange.gather_queries(model.norm(model.hc_head(streams_TND)))
        end_T = micro.exchange.queries_of_microbatch(self.ends[index].flatten().to(device))
        at = end_T.nonzero()[:, 0]
        if not len(at):
            return
        number = end_T[at] - 1
        logits_nV = self.ranks.gather_logits(model.head(hidden_TD[at]))
        chances_nV = probabilities(logits_nV, Sampling(self.temperature))
        token_n = draw_at(chances_nV, self.uniform_R[number])
        log_p_n = chances_nV.gather(1, token_n[:, None])[:, 0].log()
        self.drawn_2R[:, number] = torch.stack([token_n.double(), log_p_n.double()])
