"""Tokens dispatched to their experts and combined again, with all experts on one rank."""

from __future__ import annotations

import pytest
import torch

from model.dispatch import LocalDispatch
from model.kernels.grouped_mm import row_alignment
from model.router import Routing
from tests.model.kernels.compare import rand


def routing_of(indices: torch.Tensor, experts: int) -> Routing:
    weights = rand(*indices.shape, seed=8).abs()
    return Routing(indices, weights, torch.ones(len(indices), experts))


@pytest.mark.parametrize(("tokens", "experts", "active"), [(1, 4, 2), (37, 8, 3), (100, 5, 5)])
def test_dispatch_gives_every_expert_its_rows_and_combine_brings_them_back(tokens, experts, active):
    generator = torch.Generator().manual_seed(1)
    indices = torch.rand(tokens, experts, generator=generator).topk(active).indices
    routing = routing_of(indices, experts)
    x = rand(tokens, 4)
    sent, alignment = LocalDispatch().dispatch(x, routing, experts), row_alignment(x)
    assert (sent.ends_E % alignment == 0).all() and int(sent.ends_E[-1]) <= len(sent.rows_PD)
    start = 0
    for e, end in enumerate(sent.ends_E.tolist()):
        pairs = [(t, a) for t in range(tokens) for a in range(active) if indices[t, a] == e]
        real = len(pairs)
        assert end - start == -(-real // alignment) * alignment
        for place, (t, a) in enumerate(pairs, start):
            assert torch.equal(sent.rows_PD[place], x[t])
            assert sent.weights_P[place] == routing.weights_TA[t, a]
        assert (sent.weights_P[start + real : end] == 0).all(), "padding rows"
        start = end
    combined = LocalDispatch().combine(sent.rows_PD * sent.weights_P[:, None], sent, tokens)
    torch.testing.assert_close(combined, x * routing.weights_TA.sum(1, keepdim=True))
