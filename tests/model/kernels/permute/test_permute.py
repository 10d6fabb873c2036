"""Rows spread to their places and collected again, and the dispatch that is built on them."""

from __future__ import annotations

import pytest
import torch

from model.dispatch import ROW_ALIGNMENT, LocalDispatch
from model.kernels.permute import collect_rows, spread_rows
from model.kernels.permute.naive import naive_collect_rows, naive_spread_rows
from model.router import Routing
from tests.model.kernels.compare import assert_same, rand


def places(tokens: int, choices: int, gaps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random order of all pairs with unused places between; these hold copies of pair 0."""
    pairs = tokens * choices
    place = torch.randperm(pairs + gaps, generator=torch.Generator().manual_seed(3))[:pairs]
    order = torch.zeros(pairs + gaps, dtype=torch.int64)
    order[place] = torch.arange(pairs)
    return order, place


@pytest.mark.parametrize(
    ("tokens", "choices", "gaps"), [(1, 1, 0), (5, 3, 0), (5, 3, 6), (40, 6, 9)]
)
def test_spread_copies_each_row_to_its_places(tokens, choices, gaps):
    order, place = places(tokens, choices, gaps)

    assert_same(
        lambda x: spread_rows(x, order, place),
        lambda x: naive_spread_rows(x, order, place),
        [rand(tokens, 4)],
        rtol=1e-6,
    )


@pytest.mark.parametrize(("tokens", "choices"), [(1, 1), (5, 3), (40, 6)])
def test_collect_sums_each_token_s_rows(tokens, choices):
    order, place = places(tokens, choices, 0)

    assert_same(
        lambda y: collect_rows(y, order, place, tokens),
        lambda y: naive_collect_rows(y, place, tokens),
        [rand(tokens * choices, 4)],
        rtol=1e-6,
    )


def routing_of(indices: torch.Tensor, experts: int) -> Routing:
    weights = rand(*indices.shape, seed=8).abs()
    return Routing(indices, weights, torch.ones(len(indices), experts))


@pytest.mark.parametrize(("tokens", "experts", "active"), [(1, 4, 2), (37, 8, 3), (100, 5, 5)])
def test_dispatch_gives_every_expert_its_rows_and_combine_brings_them_back(tokens, experts, active):
    generator = torch.Generator().manual_seed(1)
    indices = torch.rand(tokens, experts, generator=generator).topk(active).indices
    routing = routing_of(indices, experts)
    x = rand(tokens, 4)
    sent = LocalDispatch().dispatch(x, routing, experts)
    assert (sent.ends_E % ROW_ALIGNMENT == 0).all() and int(sent.ends_E[-1]) <= len(sent.rows_PD)
    start = 0
    for e, end in enumerate(sent.ends_E.tolist()):
        pairs = [(t, a) for t in range(tokens) for a in range(active) if indices[t, a] == e]
        real = len(pairs)
        assert end - start == -(-real // ROW_ALIGNMENT) * ROW_ALIGNMENT
        for place, (t, a) in enumerate(pairs, start):
            assert torch.equal(sent.rows_PD[place], x[t])
            assert sent.weights_P[place] == routing.weights_TA[t, a]
        assert (sent.weights_P[start + real : end] == 0).all(), "rows that only fill up"
        start = end
    combined = LocalDispatch().combine(sent.rows_PD * sent.weights_P[:, None], sent, tokens)
    torch.testing.assert_close(combined, x * routing.weights_TA.sum(1, keepdim=True))
