"""Triton's matmuls of groups, in the interpreter, against float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from model.kernels.grouped_mm import grouped_mm
from model.kernels.grouped_mm.naive import naive_grouped_mm
from model.kernels.operations import Choice
from tests.model.kernels.compare import rand
from tests.model.kernels.interpreter import interpreted, last_program_first

ENDS = (40, 40, 190, 195)
"""A group of less than a tile, one of no rows, one of a tile and a bit, one of a few rows."""
ROWS, INPUTS, OUTPUTS = 208, 200, 136


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """Small bands: these few tiles fill several, the last in part."""
    from model.kernels.grouped_mm import matmul_triton

    old, matmul_triton._BAND = matmul_triton._BAND, 2
    try:
        yield
    finally:
        matmul_triton._BAND = old


# The interpreter does not multiply bf16.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("ends", [ENDS, (0, 0, 0, 0), (ROWS,) * 4])
@interpreted
def test_every_group_has_its_own_matrix(dtype: torch.dtype, ends: tuple[int, ...]) -> None:
    """Rows after the last group are NaN and reach nothing; every weight has a gradient."""
    ends_E = torch.tensor(ends, dtype=torch.int32)
    x, grad = rand(ROWS, INPUTS, seed=1).to(dtype), rand(ROWS, OUTPUTS, seed=2).to(dtype)
    x[ends[-1] :] = grad[ends[-1] :] = torch.nan
    weight = rand(len(ends), OUTPUTS, INPUTS, seed=3).to(dtype)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    truth = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with last_program_first():
        out = grouped_mm(*leaves, ends_E, Choice("triton"))
        grads = torch.autograd.grad(out, leaves, grad)
    expected = naive_grouped_mm(*truth, ends_E)
    expected_grads = torch.autograd.grad(expected, truth, grad[: ends[-1]].double())
    # Products of fp16 are exact in fp32, and sums lose 2^-24 a term: the last rounding shows.
    tolerance = 2**-11 if dtype == torch.float16 else 1e-5
    pairs = [(out, expected), *zip(grads, expected_grads, strict=True)]
    for ours, theirs in pairs[:2]:
        ours, theirs = ours[: ends[-1]], theirs[: ends[-1]]
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=1e-4)
    torch.testing.assert_close(pairs[2][0].double(), pairs[2][1], rtol=tolerance, atol=1e-4)


@interpreted
def test_transposed_inputs() -> None:
    ends_E = torch.tensor(ENDS, dtype=torch.int32)
    x = rand(INPUTS, ROWS, seed=1).t()
    weight = rand(INPUTS, len(ENDS), OUTPUTS, seed=2).permute(1, 2, 0)
    out = grouped_mm(x, weight, ends_E, Choice("triton"))[: ENDS[-1]]
    expected = naive_grouped_mm(x.double(), weight.double(), ends_E)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
