"""Rows spread to their places and collected again."""

from __future__ import annotations

import pytest
import torch

from model.kernels.permute import permute_rows, unpermute_rows
from model.kernels.permute.naive import naive_permute_rows, naive_unpermute_rows
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
        lambda x: permute_rows(x, order, place),
        lambda x: naive_permute_rows(x, order, place),
        [rand(tokens, 4)],
        rtol=1e-6,
    )


@pytest.mark.parametrize(("tokens", "choices"), [(1, 1), (5, 3), (40, 6)])
def test_unpermute_sums_each_token_s_rows(tokens, choices):
    order, place = places(tokens, choices, 0)

    assert_same(
        lambda y: unpermute_rows(y, order, place, tokens),
        lambda y: naive_unpermute_rows(y, place, tokens),
        [rand(tokens * choices, 4)],
        rtol=1e-6,
    )
