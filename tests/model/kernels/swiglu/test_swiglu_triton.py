"""Triton's clamped SwiGLU, in its interpreter, against the formula in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.model.kernels.compare import assert_same, rand
from tests.model.kernels.interpreter import interpreted, last_program_first
from tests.model.kernels.swiglu.test_swiglu import LIMIT, corners, naive


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    from model.kernels.swiglu import swiglu_triton

    with patch.object(swiglu_triton, "_COLUMNS", 16):
        yield


def swiglu(gate: Tensor, up: Tensor, weight: Tensor | None = None) -> Tensor:
    from model.kernels.swiglu import swiglu_triton

    return swiglu_triton.clamped_swiglu(gate, up, LIMIT, weight)


@interpreted
def test_values_and_gradients_at_and_beyond_the_clamp():
    gate, up = corners()
    assert_same(swiglu, naive, [gate, up], rtol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (33, 50)])
@interpreted
def test_random_values_with_row_weights(shape, seed):
    inputs = [rand(*shape, seed=10 * seed + i, scale=2) for i in range(2)]
    assert_same(swiglu, naive, [*inputs, rand(shape[0], seed=10 * seed + 3)], rtol=1e-5)


@interpreted
def test_no_rows_and_rows_that_were_not_computed():
    assert swiglu(torch.zeros(0, 8), torch.zeros(0, 8), torch.zeros(0)).shape == (0, 8)
    gate, weight = rand(9, 20, seed=1), rand(9, seed=2)
    gate[6:] = float("nan")
    out = swiglu(gate, rand(9, 20, seed=3), weight)
    assert out[:6].isfinite().all() and out[6:].isnan().all()


@interpreted
def test_16_bits():
    """fp16, because the interpreter cuts bits off where it makes bf16 numbers."""
    inputs = [rand(9, 20, seed=i, scale=2).half() for i in range(2)]
    out = swiglu(*inputs)
    assert out.dtype == torch.float16
    torch.testing.assert_close(
        out.double(), naive(*[x.double() for x in inputs]), rtol=2e-3, atol=1e-6
    )


@interpreted
def test_the_order_of_programs_changes_no_bit():
    def results() -> list[Tensor]:
        leaves = [rand(33, 50, seed=1), rand(33, 50, seed=2), rand(33, seed=3)]
        leaves = [x.requires_grad_() for x in leaves]
        swiglu(*leaves).sum().backward()
        return [x.grad for x in leaves]

    first = results()
    with last_program_first():
        second = results()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreted
def test_a_lower_clamp_of_the_gate_is_detected():
    """The negative control."""
    gate, up = corners()
    with pytest.raises(AssertionError, match="result 0"):
        assert_same(swiglu, lambda g, u: naive(g.clamp(-LIMIT), u), [gate, up], rtol=1e-6)
