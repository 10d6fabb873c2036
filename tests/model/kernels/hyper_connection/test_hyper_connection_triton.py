"""Triton's hyper-connections, in its interpreter, against loops in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model.kernels.hyper_connection.naive import (
    naive_collapse_streams,
    naive_read_streams,
    naive_write_streams,
)
from tests.model.kernels.compare import assert_same, rand
from tests.model.kernels.hyper_connection.test_hyper_connection import (
    HC_EPS,
    ITERATIONS,
    NORM_EPS,
    naive_read,
)
from tests.model.kernels.interpreter import interpreted, last_program_first

EPS = {"norm_eps": NORM_EPS, "hc_eps": HC_EPS}
SIZES = [(150, 4, 75), (37, 2, 300), (1, 4, 10), (65, 1, 33)]
"""Tokens, streams and width: several blocks of each, none of them whole."""


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """Columns in more than one block; and two programs at least where work is divided."""
    from model.kernels.hyper_connection import mix_triton as mix
    from model.kernels.hyper_connection import project_triton as project

    old = mix._BLOCK_D, project._COLUMNS
    mix._BLOCK_D, project._COLUMNS = 64, 32
    try:
        yield
    finally:
        mix._BLOCK_D, project._COLUMNS = old


def parameters(tokens: int, streams: int, dim: int, seed: int) -> list[Tensor]:
    rows = (2 + streams) * streams
    shapes = [(tokens, streams, dim), (rows, streams * dim), (rows,), (3,)]
    out = [rand(*shape, seed=10 * seed + i) for i, shape in enumerate(shapes)]
    out[1] *= (streams * dim) ** -0.5
    return out


def read(*inputs: Tensor, iterations: int | None = ITERATIONS):
    from model.kernels.hyper_connection import streams_triton

    return streams_triton.read_streams(*inputs, **EPS, iterations=iterations)


def write(*inputs: Tensor) -> Tensor:
    from model.kernels.hyper_connection import streams_triton

    return streams_triton.write_streams(*inputs)


def writing(tokens: int, streams: int, dim: int, seed: int) -> list[Tensor]:
    shapes = [(tokens, streams, dim), (tokens, dim), (tokens, streams), (tokens, streams, streams)]
    return [rand(*shape, seed=10 * seed + i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES)
@interpreted
def test_read(size, seed):
    assert_same(read, naive_read, parameters(*size, seed), rtol=1e-5)


@interpreted
def test_read_with_one_step_of_sinkhorn():
    inputs = parameters(5, 4, 10, 0)
    assert_same(
        lambda *x: read(*x, iterations=1),
        lambda *x: naive_read_streams(*x, NORM_EPS, HC_EPS, 1),
        inputs,
        rtol=1e-5,
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES)
@interpreted
def test_write(size, seed):
    assert_same(write, naive_write_streams, writing(*size, seed), rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@interpreted
def test_collapse(size):
    tokens, streams, dim = size
    inputs = [rand(tokens, streams, dim, seed=1), rand(streams, streams * dim, seed=2) * 0.1]
    inputs += [rand(streams, seed=3), rand(1, seed=4)]

    assert_same(
        lambda *x: read(*x, iterations=None),
        lambda *x: naive_collapse_streams(*x, NORM_EPS, HC_EPS),
        inputs,
        rtol=1e-5,
    )


@interpreted
def test_bf16_streams_are_mixed_in_fp32():
    size = (37, 4, 40)
    inputs = parameters(*size, 0)
    inputs[0] = inputs[0].bfloat16()
    for actual, other in zip(read(*inputs), naive_read(*[x.double() for x in inputs]), strict=True):
        tolerance = 1e-2 if actual.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(actual.double(), other, rtol=tolerance, atol=tolerance)
    inputs = writing(*size, 0)
    inputs[:2] = [x.bfloat16() for x in inputs[:2]]
    assert_same(write, naive_write_streams, inputs, rtol=8e-3)  # the interpreter cuts bits off
    assert write(*inputs).dtype == torch.bfloat16


@interpreted
def test_the_order_of_programs_changes_no_bit():
    def results() -> list[Tensor]:
        computed = []
        for function, inputs in (
            (read, parameters(150, 4, 75, 0)),
            (write, writing(150, 4, 75, 0)),
        ):
            leaves = [x.requires_grad_() for x in inputs]
            out = function(*leaves)
            out = out if isinstance(out, tuple) else (out,)
            sum((x * rand(*x.shape, seed=7)).sum() for x in out).backward()
            computed += [*[x.detach() for x in out], *[x.grad for x in leaves]]
        return computed

    first = results()
    with last_program_first():
        second = results()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreted
def test_a_transposed_mix_is_detected():
    """The negative control: the sum runs over comb's first index."""
    with pytest.raises(AssertionError, match="result 0"):
        assert_same(
            write,
            lambda x, y, post, comb: naive_write_streams(x, y, post, comb.transpose(1, 2)),
            writing(5, 4, 10, 0),
            rtol=1e-5,
        )


@interpreted
def test_three_streams_are_refused():
    with pytest.raises(ValueError, match="3 residual streams"):
        write(*writing(5, 3, 10, 0))
