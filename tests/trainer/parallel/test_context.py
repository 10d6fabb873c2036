"""Rows divided over ranks: every method of the exchange against the undivided microbatch.

Four ranks, tensor 2 x context 2. Rank r holds run r of every row, its context rank's two runs are
its queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.layout import SampleLayout
from model.positions import Positions
from tests.distributed import spawn
from tests.model.tiny import tiny_config
from trainer.parallel.context import SequenceExchange, shard_rows
from trainer.parallel.degrees import Degrees
from trainer.parallel.grid import Grid

RANKS, ROWS, SEQ_LEN, WIDTH = 4, 2, 64, 3
RUN = SEQ_LEN // RANKS
LENGTHS = [[5, 40, 19], [64]]
CONFIG = tiny_config()
X_TX = torch.arange(ROWS * SEQ_LEN * WIDTH, dtype=torch.float32).view(-1, WIDTH)


def runs(first: int, count: int) -> Tensor:
    """Indices of `count` runs of every row, from run `first` on."""
    tokens = torch.arange(ROWS * SEQ_LEN).view(ROWS, SEQ_LEN)
    return tokens[:, first * RUN : (first + count) * RUN].flatten()


def on_rank(rank: int, world_size: int) -> None:
    degrees = Degrees(world_size, tensor=2, context=2)
    grid = Grid.build(degrees, torch.device("cpu"))
    layout = SampleLayout.from_lengths(LENGTHS)
    positions, exchange = shard_rows(CONFIG, layout, grid)
    local, queries = runs(rank, 1), runs(rank // 2 * 2, 2)
    check_tokens(exchange, local, queries)
    check_entries(positions, exchange, layout, local, rank)
    whole = Positions.of_microbatch(CONFIG, layout)
    for kind in positions.ratios:
        assert torch.equal(positions.rotation(kind), whole.rotation(kind)[local])
        assert torch.equal(positions.query_rotation(kind), whole.rotation(kind)[queries])
        if kind != "window":
            assert positions.max_visible(kind) == whole.max_visible(kind)
    counts = torch.full((3, 4), float(rank))
    assert torch.equal(exchange.sum_counts(counts), torch.full((3, 4), 6.0))


def check_tokens(exchange: SequenceExchange, local: Tensor, queries: Tensor) -> None:
    ids_T = torch.arange(ROWS * SEQ_LEN)
    assert torch.equal(exchange.local_of_microbatch(ids_T), local)
    assert torch.equal(exchange.queries_of_microbatch(ids_T), queries)
    assert torch.equal(exchange.gather_queries(X_TX[local]), X_TX[queries])
    assert torch.equal(exchange.gather_queries(local), queries), "integers as well"
    assert torch.equal(exchange.local_of_queries(X_TX[queries]), X_TX[local])
    # Both tensor ranks give the same partial results.
    assert torch.equal(exchange.reduce_scatter_queries(X_TX[queries]), 2 * X_TX[local])
    keys = exchange.gather_keys(X_TX[local]).view(ROWS, -1, WIDTH)
    halo = CONFIG.sliding_window - 1
    for row, first in enumerate(queries.view(ROWS, -1)[:, 0].tolist()):
        before = torch.arange(first - halo, first)
        expected = X_TX[before.clamp(min=0)] * (before >= row * SEQ_LEN)[:, None]
        assert torch.equal(keys[row, :halo], expected), "zeros before a row's first token"
        assert torch.equal(keys[row, halo:], X_TX[queries].view(ROWS, -1, WIDTH)[row])


def check_entries(
    positions: Positions, exchange: SequenceExchange, layout: SampleLayout, local: Tensor, rank: int
) -> None:
    """Sums over windows, pooled by ranks and gathered, against the same sums on one process."""
    whole = Positions.of_microbatch(CONFIG, layout)
    for kind, ratio in positions.ratios.items():
        if not ratio:
            continue
        values_TX, gates_TX = exchange.prepend_halo(kind, X_TX[local], -X_TX[local])
        assert torch.equal(gates_TX, -values_TX)
        pooled = pool(values_TX, positions.windows(kind).first_token_C, ratio)
        expected = pool(X_TX, whole.windows(kind).first_token_C, ratio)
        assert len(expected), kind
        assert torch.equal(exchange.gather_entries(kind, pooled), expected), (rank, kind)


def pool(x_TX: Tensor, first_C: Tensor, ratio: int) -> Tensor:
    return x_TX[first_C[:, None] + torch.arange(ratio)].sum(1)


def test_every_exchange_between_four_ranks() -> None:
    spawn(on_rank, RANKS)
