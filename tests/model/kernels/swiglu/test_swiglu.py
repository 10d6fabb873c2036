"""Clamped SwiGLU against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.kernels.swiglu import clamped_swiglu
from model.kernels.swiglu.naive import naive_clamped_swiglu
from tests.model.kernels.compare import assert_same, rand

LIMIT = 1.5


def naive(gate: Tensor, up: Tensor, weight: Tensor | None = None) -> Tensor:
    return naive_clamped_swiglu(gate, up, LIMIT, weight)


def corners() -> tuple[Tensor, Tensor]:
    """Every pair of values below, at and beyond the clamp, on either side."""
    values = torch.tensor([-40.0, -1.51, -1.5, -1.49, 0.0, 1.49, 1.5, 1.51, 40.0])
    gate, up = torch.meshgrid(values, values, indexing="ij")
    return gate.contiguous(), up.contiguous()


def test_values_and_gradients_at_and_beyond_the_clamp():
    gate, up = corners()
    assert_same(lambda *x: clamped_swiglu(*x, LIMIT), naive, [gate, up], rtol=1e-6)


def test_beyond_the_clamp_there_is_no_gradient_and_at_it_there_is():
    gate, up = (x.requires_grad_() for x in corners())
    clamped_swiglu(gate, up, LIMIT).sum().backward()
    inside_up = up.detach() != 0
    assert (gate.grad[gate > LIMIT] == 0).all() and (up.grad[up.abs() > LIMIT] == 0).all()
    assert (gate.grad[(gate == LIMIT) & inside_up] != 0).all()
    assert (up.grad[(up.abs() == LIMIT) & (gate != 0)] != 0).all()
    assert (gate.grad[(gate == -1.51) & inside_up] != 0).all(), "the gate has no lower clamp"


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (33, 40)])
def test_random_values_with_row_weights(shape):
    inputs = [rand(*shape, seed=1, scale=2), rand(*shape, seed=2, scale=2), rand(shape[0], seed=3)]
    assert_same(lambda g, u, w: clamped_swiglu(g, u, LIMIT, w), naive, inputs, rtol=1e-5)


def test_no_rows():
    empty = torch.zeros(0, 8, requires_grad=True)
    out = clamped_swiglu(empty, torch.zeros(0, 8), LIMIT, torch.zeros(0))
    out.sum().backward()
    assert out.shape == (0, 8)


def test_bf16():
    inputs = [rand(9, 8, seed=s, scale=2).bfloat16() for s in (1, 2)]
    out = clamped_swiglu(*inputs, LIMIT)
    assert out.dtype == torch.bfloat16
    exact = naive(*[x.double() for x in inputs])
    # Computed in fp32 and rounded once: half a unit in the last place of bf16.
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-30).all()


def test_a_row_has_the_same_bits_wherever_it_stands():
    # 13 is no multiple of a vector register, so that rows fall into vectors and remainders alike.
    gate, up = rand(200, 13, seed=1, scale=2), rand(200, 13, seed=2)
    whole = clamped_swiglu(gate, up, LIMIT)
    for start in range(1, 200):
        assert torch.equal(clamped_swiglu(gate[start:], up[start:], LIMIT), whole[start:]), start
        assert torch.equal(clamped_swiglu(gate[:start], up[:start], LIMIT), whole[:start]), start
