"""Triton's sum of expert rows, in its interpreter, against the naive sum in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

from model.kernels.permute.naive import naive_unpermute_rows
from tests.model.kernels.compare import rand
from tests.model.kernels.interpreter import interpreted
from tests.model.kernels.permute.test_permute import random_pairs


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    from model.kernels.permute import unpermute_triton

    with patch.object(unpermute_triton, "_COLUMNS", 16):
        yield


@pytest.mark.parametrize(("tokens", "choices", "gaps"), [(1, 1, 0), (5, 3, 4), (40, 6, 9)])
@interpreted
def test_unpermute_sums_each_token_s_rows(tokens, choices, gaps):
    from model.kernels.permute import unpermute_triton

    _, row_of_pair = random_pairs(tokens, choices, gaps)
    y = rand(tokens * choices + gaps, 37)
    out = unpermute_triton.unpermute(y, row_of_pair, tokens)
    expected = naive_unpermute_rows(y.double(), row_of_pair, tokens)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)
