"""Pooling of windows against loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model import SampleLayout
from model.kernels.compressor import pool_windows
from model.kernels.compressor.naive import naive_pool_windows
from tests.model.kernels.compare import assert_same, rand

DIM = 6


def windows(lengths: list[int], m: int) -> tuple[Tensor, Tensor]:
    """First token of each whole window, and whether its sample has a window before it."""
    first, has_previous, start = [], [], 0
    for n in lengths:
        first += range(start, start + n // m * m, m)
        has_previous += [i > 0 for i in range(n // m)]
        start += n
    return torch.tensor(first, dtype=torch.int64), torch.tensor(has_previous, dtype=torch.bool)


def naive(values: Tensor, gates: Tensor, ape: Tensor, lengths: list[int], overlap: bool) -> Tensor:
    return naive_pool_windows(values, gates, ape, *windows(lengths, len(ape)), overlap)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    ("lengths", "m"),
    [([16], 4), ([19], 4), ([1, 2, 3, 4, 5, 8, 30], 4), ([127, 128, 129, 300], 128), ([3, 2], 4)],
)
def test_equals_loops(lengths, m, overlap):
    entries = SampleLayout.from_lengths([lengths]).entries(m)
    width = 2 * DIM if overlap else DIM
    tokens = sum(lengths)

    def kernel(values: Tensor, gates: Tensor, ape: Tensor) -> Tensor:
        return pool_windows(
            values, gates, ape, entries.first_token_C, entries.has_previous_C, overlap
        )

    inputs = [rand(tokens, width, seed=1), rand(tokens, width, seed=2), rand(m, width, seed=3)]
    assert_same(kernel, lambda *x: naive(*x, lengths, overlap), inputs, rtol=1e-5)


def test_bf16_inputs_are_pooled_in_fp32():
    entries = SampleLayout.from_lengths([[23]]).entries(4)
    values, gates = rand(23, 2 * DIM, seed=1).bfloat16(), rand(23, 2 * DIM, seed=2).bfloat16()
    ape = rand(4, 2 * DIM, seed=3)
    where = (entries.first_token_C, entries.has_previous_C, True)
    pooled = pool_windows(values, gates, ape, *where)
    assert pooled.dtype == torch.float32
    expected = naive(values.double(), gates.double(), ape.double(), [23], True)
    torch.testing.assert_close(pooled.double(), expected, rtol=0, atol=1e-5)


def test_tokens_after_the_last_whole_window_have_no_part():
    entries = SampleLayout.from_lengths([[6, 5]]).entries(4)
    values = rand(11, DIM, seed=1).requires_grad_()
    pool_windows(
        values,
        rand(11, DIM, seed=2),
        rand(4, DIM, seed=3),
        entries.first_token_C,
        entries.has_previous_C,
        False,
    ).sum().backward()
    unused = [4, 5, 10]
    assert values.grad[unused].abs().max() == 0
    assert (values.grad[[t for t in range(11) if t not in unused]] > 0).all()
