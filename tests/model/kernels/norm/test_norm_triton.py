"""Triton's norms and rotations, in its interpreter, against formulas in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model.kernels.norm.naive import naive_rms_norm, naive_rotate
from tests.model.kernels.compare import assert_same, rand
from tests.model.kernels.interpreter import interpreted, last_program_first

EPS = 1e-2
"""Far larger than V4's, so that a forgotten one shows."""


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """Few rows a program, and few programs for the weight's gradient."""
    from model.kernels.norm import norm_triton as kernels

    old = kernels._ELEMENTS, kernels._PARTS
    kernels._ELEMENTS, kernels._PARTS = 128, 3
    try:
        yield
    finally:
        kernels._ELEMENTS, kernels._PARTS = old


def turn(rows: int, rotary: int) -> Tensor:
    return torch.polar(torch.ones(rows, rotary // 2), rand(rows, rotary // 2, seed=8))


def norm(x: Tensor, weight: Tensor, rotation: Tensor | None, dtype=torch.float32) -> Tensor:
    from model.kernels.norm import norm_triton

    return norm_triton.rms_norm(x, weight, EPS, rotation, dtype)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("rows", "dim", "rotary"), [(61, 24, 0), (61, 24, 6), (1, 16, 16), (9, 48, 4)]
)
@interpreted
def test_norm_equals_the_formula(rows, dim, rotary, seed):
    rotation = turn(rows, rotary) if rotary else None
    inputs = [rand(rows, dim, seed=10 * seed + 1), rand(dim, seed=10 * seed + 2)]
    assert_same(
        lambda *x: norm(*x, rotation),
        lambda *x: naive_rms_norm(*x, EPS, rotation),
        inputs,
        rtol=1e-5,
    )


@interpreted
def test_any_number_of_leading_dims():
    inputs = [rand(3, 5, 12, seed=1), rand(12, seed=2)]
    assert_same(lambda *x: norm(*x, None), lambda *x: naive_rms_norm(*x, EPS), inputs, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 3])
@interpreted
def test_rotation_equals_the_formula(heads):
    from model.kernels.norm import norm_triton

    rotation = turn(17, 6)
    x = rand(17, heads, 12, seed=1)

    assert_same(
        lambda x: norm_triton.rotate(x, rotation),
        lambda x: naive_rotate(x, rotation),
        [x],
        rtol=1e-6,
    )


@interpreted
def test_nothing_is_rounded_before_the_end():
    x, weight, rotation = rand(40, 24, seed=1).bfloat16(), rand(24, seed=2), turn(40, 6)
    exact = naive_rms_norm(x.double(), weight.double(), EPS, rotation)
    torch.testing.assert_close(norm(x, weight, rotation).double(), exact, rtol=0, atol=1e-5)
    # fp16, because the interpreter cuts bits off where it makes bf16 numbers.
    rounded = norm(x, weight, rotation, torch.float16)
    assert torch.equal(rounded, norm(x, weight, rotation).half())


@interpreted
def test_the_order_of_programs_changes_no_bit():
    def results() -> list[Tensor]:
        leaves = [x.requires_grad_() for x in (rand(61, 24, seed=1), rand(24, seed=2))]
        out = norm(*leaves, turn(61, 6))
        (out * rand(*out.shape, seed=7)).sum().backward()
        return [out.detach(), *[x.grad for x in leaves]]

    first = results()
    with last_program_first():
        second = results()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreted
def test_a_turn_the_other_way_is_detected():
    """The negative control."""
    inputs, rotation = [rand(9, 24, seed=1), rand(24, seed=2)], turn(9, 6)
    with pytest.raises(AssertionError, match="result 0"):
        assert_same(
            lambda *x: norm(*x, rotation),
            lambda *x: naive_rms_norm(*x, EPS, rotation.conj()),
            inputs,
            1e-5,
        )
