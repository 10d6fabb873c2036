"""MoE permute and unpermute against loops over rows."""

from __future__ import annotations

import pytest
import torch

from model.kernels.permute import permute_rows, unpermute_rows
from model.kernels.permute.naive import naive_permute_rows, naive_unpermute_rows
from tests.model.kernels.compare import assert_same, rand


def random_pairs(tokens: int, choices: int, gaps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random order of all pairs with padding rows between; these hold copies of token 0."""
    pairs = tokens * choices
    row_of_pair = torch.randperm(pairs + gaps, generator=torch.Generator().manual_seed(3))[:pairs]
    token_of_row = torch.zeros(pairs + gaps, dtype=torch.int64)
    token_of_row[row_of_pair] = torch.arange(pairs) // choices
    return token_of_row, row_of_pair


@pytest.mark.parametrize(
    ("tokens", "choices", "gaps"), [(1, 1, 0), (5, 3, 0), (5, 3, 6), (40, 6, 9)]
)
def test_permute_copies_each_row_to_its_pairs_rows(tokens, choices, gaps):
    token_of_row, row_of_pair = random_pairs(tokens, choices, gaps)

    assert_same(
        lambda x: permute_rows(x, token_of_row, row_of_pair),
        lambda x: naive_permute_rows(x, token_of_row, row_of_pair),
        [rand(tokens, 4)],
        rtol=1e-6,
    )


@pytest.mark.parametrize(("tokens", "choices"), [(1, 1), (5, 3), (40, 6)])
def test_unpermute_sums_each_token_s_rows(tokens, choices):
    token_of_row, row_of_pair = random_pairs(tokens, choices, 0)

    assert_same(
        lambda y: unpermute_rows(y, token_of_row, row_of_pair, tokens),
        lambda y: naive_unpermute_rows(y, row_of_pair, tokens),
        [rand(tokens * choices, 4)],
        rtol=1e-6,
    )
