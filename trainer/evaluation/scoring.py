"""Log-probabilities of continuations, several of them packed in a row, by the forward of training.

Letters: B rows, S tokens of a row, T queries of a rank, N streams, D hidden size, V vocabulary, v
vocabulary of a rank, R continuations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data import Batch
from data.rows import pack
from model import IGNORE_INDEX, V4Model
from model.kernels.cross_entropy import chunk_tokens
from model.transformer import Microbatch
from trainer.engine import Engine
from trainer.generate.ranks import Ranks
from trainer.parallel.collectives import all_reduce_


@dataclass(frozen=True)
class Continuation:
    """Tokens, the last of which are scored.

    Attributes:
        tokens: context and continuation, at least two.
        count: how many of the last tokens are the continuation; less than all.
    """

    tokens: Sequence[int]
    count: int


@dataclass(frozen=True)
class RowSizes:
    """The microbatches in which continuations are packed.

    Attributes:
        seq_len: tokens of a row, or a multiple of it for continuations that are longer.
        rows: rows of a microbatch, fewer where they are longer.
    """

    seq_len: int
    rows: int


@dataclass(frozen=True)
class Score:
    """A continuation's log-probability, in nats, and whether each token was the most likely one."""

    log_likelihood: float
    is_greedy: bool


def score(
    engine: Engine,
    continuations: Sequence[Continuation],
    sizes: RowSizes,
    before_batch: Callable[[int, int], None],
) -> list[Score]:
    """Returns the score of each continuation, the same on every rank; all ranks call it.

    Data ranks divide the rows. `before_batch` is called with the number of finished batches and
    the total.
    """
    grid, model = engine.grid, engine.model
    sums_R2 = torch.zeros(len(continuations), 2, dtype=torch.float64, device=grid.device)
    batches = list(_batches(continuations, sizes, grid.data.size, model.config.pad_token_id))
    per_call = grid.pipeline.size  # so that no stage waits for all others
    for first in range(0, len(batches), per_call):
        before_batch(first, len(batches))
        of_rank = [packed[grid.data.rank] for packed in batches[first : first + per_call]]
        for group in _of_one_shape(of_rank):
            owners = [owner_BS.to(grid.device) for _, owner_BS in group]
            reader = _Reader(model, Ranks(grid), owners, sums_R2)
            engine.read_streams([batch for batch, _ in group], reader)
    if not grid.tensor.is_first:  # each tensor rank has the full sums
        sums_R2.zero_()
    sums = all_reduce_(sums_R2, grid.world).tolist()
    return [Score(log_likelihood, misses == 0) for log_likelihood, misses in sums]


_Packed = tuple[Batch, Tensor]
"""A microbatch, and the continuation [B, S] to which each of its targets belongs."""


def _of_one_shape(batches: Sequence[_Packed]) -> Iterator[list[_Packed]]:
    """Yields consecutive microbatches of equal shapes together, as a pipeline takes them."""
    group: list[_Packed] = []
    for batch in batches:
        if group and batch[1].shape != group[0][1].shape:
            yield group
            group = []
        group.append(batch)
    yield group


def _batches(
    continuations: Sequence[Continuation], sizes: RowSizes, ranks: int, pad: int
) -> Iterator[list[_Packed]]:
    """Yields a microbatch for every data rank, until each continuation is in one of them.

    The longest come first, so that a lack of memory shows at once.
    """
    length_R = np.array([len(item.tokens) - 1 for item in continuations])
    row_R = -(-length_R // sizes.seq_len)
    for multiple in sorted({*row_R.tolist()}, reverse=True):
        chosen = np.flatnonzero(row_R == multiple)
        seq_len = multiple * sizes.seq_len
        packed = pack(length_R[chosen], seq_len)
        rows = [[int(chosen[doc]) for doc, _, _ in packed.row(i)] for i in range(len(packed))]
        size = max(sizes.rows // multiple, 1)
        for first in range(0, len(rows), size * ranks):
            groups = [rows[first + n * size :][:size] for n in range(ranks)]
            shape = (size, seq_len)
            yield [_batch(continuations, group, shape, pad) for group in groups]


def _batch(
    continuations: Sequence[Continuation], rows: list[list[int]], shape: tuple[int, int], pad: int
) -> _Packed:
    """Fills a microbatch; missing rows have no samples."""
    tokens_BS = np.full(shape, pad, dtype=np.int64)
    targets_BS = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    owner_BS = np.zeros(shape, dtype=np.int64)
    lengths: list[list[int]] = [[] for _ in range(shape[0])]
    for row, members in enumerate(rows):
        end = 0
        for number in members:
            item = continuations[number]
            start, end = end, end + len(item.tokens) - 1
            tokens_BS[row, start:end] = item.tokens[:-1]
            targets_BS[row, end - item.count : end] = item.tokens[-item.count :]
            owner_BS[row, start:end] = number
            lengths[row].append(end - start)
    batch = Batch(torch.from_numpy(tokens_BS), torch.from_numpy(targets_BS), lengths)
    return batch, torch.from_numpy(owner_BS)


@dataclass(frozen=True)
class _Reader:
    """Adds the log-probabilities of a microbatch's targets, and misses, to `sums_R2`."""

    model: V4Model
    ranks: Ranks
    owners: Sequence[Tensor]
    sums_R2: Tensor

    def __call__(self, streams_TND: Tensor, micro: Microbatch, index: int) -> None:
        model = self.model
        hidden_TD = micro.exchange.gather_queries(model.norm(model.hc_head(streams_TND)))
        target_T = micro.query_targets_T
        owner_T = micro.exchange.queries_of_microbatch(self.owners[index].flatten())
        scored = (target_T != IGNORE_INDEX).nonzero()[:, 0]
        for part in scored.split(chunk_tokens(model.config.vocab_size, hidden_TD.device)):
            logits_TV = self.ranks.gather_logits(model.head(hidden_TD[part])).float()
            target, owner = target_T[part], owner_T[part]
            log_p_T = logits_TV.log_softmax(-1).gather(1, target[:, None])[:, 0]
            misses_T = logits_TV.argmax(-1) != target
            self.sums_R2.index_add_(0, owner, torch.stack([log_p_T, misses_T], dim=1).double())
