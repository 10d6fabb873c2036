"""Samples packed into the rows of a step, with what the objective needs to know of each token.

A position's target is the token after it; only those of the answer count. Letters: B rows, S
positions of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from data import Batch
from data.rows import pack
from model import IGNORE_INDEX
from trainer.config import Phase
from trainer.post.rollout import Sample


def batches_of(
    samples: Sequence[Sample], phase: Phase, rank: int, ranks: int, multiple: int, pad: int
) -> list[Batch]:
    """Returns a data rank's microbatches of a step that trains on these samples.

    Every rank has the same number of them, a multiple of `multiple`, the last ones perhaps with
    rows without samples.

    Signals of a position that predicts a token of an answer: `sampler_log_p`, the token's
    log-probability when it was drawn, and `advantage`. `numbered` adds one of all positions.
    """
    seq_len, size = phase.rows.seq_len, phase.rows.micro_batch_size
    packed = pack(np.array([sample.positions for sample in samples]), seq_len)
    rows = [[int(number) for number, _, _ in packed.row(i)] for i in range(len(packed))]
    per_rank = -(-len(rows) // (ranks * size * multiple)) * multiple * size
    local = rows[rank * per_rank : (rank + 1) * per_rank]
    local += [[] for _ in range(per_rank - len(local))]
    return [
        _batch(samples, local[first : first + size], seq_len, pad)
        for first in range(0, per_rank, size)
    ]


def numbered(batches: Sequence[Batch]) -> list[Batch]:
    """Returns the microbatches with their numbers among the signals."""
    return [
        replace(batch, signals={**batch.signals, "number": torch.full_like(batch.tokens, number)})
        for number, batch in enumerate(batches)
    ]


def _batch(samples: Sequence[Sample], rows: list[list[int]], seq_len: int, pad: int) -> Batch:
    """Fills a microbatch."""
    shape = (len(rows), seq_len)
    tokens_BS = np.full(shape, pad, dtype=np.int64)
    targets_BS = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    sampler_BS = np.zeros(shape, dtype=np.float32)
    advantage_BS = np.zeros(shape, dtype=np.float32)
    lengths: list[list[int]] = [[] for _ in rows]
    for row, numbers in enumerate(rows):
        end = 0
        for number in numbers:
            sample = samples[number]
            start, end = end, end + sample.positions
            answer = slice(end - len(sample.ids), end)
            tokens_BS[row, start:end] = (*sample.prompt_ids, *sample.ids[:-1])
            targets_BS[row, answer] = sample.ids
            sampler_BS[row, answer] = sample.log_probabilities
            advantage_BS[row, answer] = sample.advantage
            lengths[row].append(end - start)
    signals = {"sampler_log_p": sampler_BS, "advantage": advantage_BS}
    return Batch(
        torch.from_numpy(tokens_BS),
        torch.from_numpy(targets_BS),
        lengths,
        {name: torch.from_numpy(values) for name, values in signals.items()},
    )
