"""Triton's pooling of windows, in its interpreter, against loops in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from model import SampleLayout
from tests.model.kernels.compare import assert_same, rand
from tests.model.kernels.compressor.test_compressor import DIM, naive
from tests.model.kernels.interpreter import interpreted, last_program_first


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """Few programs for the bias's gradient, so that each has several blocks of windows."""
    from model.kernels.compressor import pool_triton

    with patch.object(pool_triton, "_PARTS", 3):
        yield


def pool(lengths: list[int], m: int, overlap: bool, *inputs: Tensor) -> Tensor:
    from model.kernels.compressor import pool_triton

    entries = SampleLayout.from_lengths([lengths]).entries(m)
    where = (entries.first_token_C, entries.has_previous_C, overlap)
    # In blocks of two windows, or with many of them in larger ones.
    return pool_triton.pool_windows(*inputs, *where, block_x=64 if sum(lengths) > 999 else 4)


def inputs(lengths: list[int], m: int, overlap: bool, seed: int) -> list[Tensor]:
    width, tokens = 2 * DIM if overlap else DIM, sum(lengths)
    shapes = [(tokens, width), (tokens, width), (m, width)]
    return [rand(*shape, seed=10 * seed + i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    ("lengths", "m"),
    [
        ([16], 4),
        ([19], 4),
        ([1, 2, 3, 4, 5, 8, 30, 1000], 4),
        ([15, 16, 17, 100], 16),
        ([129, 300], 128),
        ([3, 2], 4),
    ],
)
@interpreted
def test_equals_loops(lengths, m, overlap, seed):
    assert_same(
        lambda *x: pool(lengths, m, overlap, *x),
        lambda *x: naive(*x, lengths, overlap),
        inputs(lengths, m, overlap, seed),
        rtol=1e-5,
    )


@interpreted
def test_bf16_inputs_are_pooled_in_fp32():
    values, gates, ape = inputs([23], 4, True, seed=0)
    values, gates = values.bfloat16(), gates.bfloat16()
    pooled = pool([23], 4, True, values, gates, ape)
    assert pooled.dtype == torch.float32
    expected = naive(values.double(), gates.double(), ape.double(), [23], True)
    torch.testing.assert_close(pooled.double(), expected, rtol=0, atol=1e-5)


@interpreted
def test_the_order_of_programs_changes_no_bit():
    def results() -> list[Tensor]:
        leaves = [x.requires_grad_() for x in inputs([30, 203], 4, True, seed=0)]
        out = pool([30, 203], 4, True, *leaves)
        (out * rand(*out.shape, seed=7)).sum().backward()
        return [out.detach(), *[leaf.grad for leaf in leaves]]

    forward = results()
    with last_program_first():
        backward = results()
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))


@interpreted
def test_a_small_fault_is_detected():
    """The negative control: the bias's place in the window matters at this tolerance."""
    lengths, m = [30], 4
    with pytest.raises(AssertionError, match="result 0"):
        assert_same(
            lambda *x: pool(lengths, m, True, *x),
            lambda v, g, ape: naive(v, g, ape.roll(1, 0), lengths, True),
            inputs(lengths, m, True, seed=0),
            rtol=1e-5,
        )
