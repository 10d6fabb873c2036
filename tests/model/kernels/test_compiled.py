"""What torch.compile makes of norms, activation and streams, against formulas in float64.

Tolerances are those of the eager versions' tests: fp32 in, fp32 out, sums of some 40 numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.kernels.hyper_connection.naive import naive_write_streams
from model.kernels.norm.naive import naive_rms_norm
from model.kernels.swiglu.eager import eager_clamped_swiglu
from tests.model.kernels.compare import assert_same, rand
from tests.model.kernels.hyper_connection.test_hyper_connection import (
    HC_EPS,
    ITERATIONS,
    NORM_EPS,
    naive_read,
)
from tests.model.kernels.norm.test_norm_triton import EPS, turn
from tests.model.kernels.swiglu.test_swiglu import LIMIT
from tests.model.kernels.swiglu.test_swiglu import naive as naive_swiglu

SIZES = [(61, 24), (33, 40), (2, 3), (1, 24), (0, 8)]
"""Rows and width. The first makes the program that serves the others, but for the last two."""
STREAMS = 4

Case = tuple[Callable[..., object], Callable[..., object], list[Tensor], float]
"""Compiled function, formula, inputs, tolerance."""


def norm(rows: int, width: int) -> Case:
    from model.kernels.norm import compiled

    return (
        lambda x, w: compiled.rms_norm(x, w, EPS, None, torch.float32),
        lambda x, w: naive_rms_norm(x, w, EPS),
        [rand(rows, width, seed=1), rand(width, seed=2)],
        1e-5,
    )


def norm_of_streams(rows: int, width: int) -> Case:
    kernel, formula, (_, weight), rtol = norm(rows, width)
    return kernel, formula, [rand(rows, 3, width, seed=1), weight], rtol


def rotated_norm(rows: int, width: int) -> Case:
    from model.kernels.norm import compiled

    rotation = turn(rows, width // 2 * 2)
    return (
        lambda x, w: compiled.rms_norm(x, w, EPS, rotation, torch.float32),
        lambda x, w: naive_rms_norm(x, w, EPS, rotation),
        [rand(rows, width, seed=1), rand(width, seed=2)],
        1e-5,
    )


def activation(rows: int, width: int) -> Case:
    from model.kernels.swiglu import compiled

    inputs = [rand(rows, width, seed=seed, scale=2) for seed in (1, 2)]
    return lambda g, u: compiled.clamped_swiglu(g, u, LIMIT), naive_swiglu, inputs, 1e-5


def weighted_activation(rows: int, width: int) -> Case:
    from model.kernels.swiglu import compiled

    _, formula, inputs, rtol = activation(rows, width)
    inputs.append(rand(rows, seed=3))
    return lambda g, u, w: compiled.clamped_swiglu(g, u, LIMIT, w), formula, inputs, rtol


def read(rows: int, width: int) -> Case:
    from model.kernels.hyper_connection import compiled

    coefficients = (2 + STREAMS) * STREAMS
    inputs = [
        rand(rows, STREAMS, width, seed=1),
        # Projections of the same size at any width.
        rand(coefficients, STREAMS * width, seed=2, scale=0.5 * width**-0.5),
        rand(coefficients, seed=3),
        rand(3, seed=4),
    ]
    eps = NORM_EPS, HC_EPS, ITERATIONS
    return lambda *x: compiled.read_streams(*x, *eps), naive_read, inputs, 3e-5


def write(rows: int, width: int, streams: int = STREAMS) -> Case:
    from model.kernels.hyper_connection import compiled

    shapes = (rows, streams, width), (rows, width), (rows, streams), (rows, streams, streams)
    inputs = [rand(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    return compiled.write_streams, naive_write_streams, inputs, 1e-5


@pytest.mark.parametrize(
    "case",
    [norm, norm_of_streams, rotated_norm, activation, weighted_activation, read, write],
    ids=lambda case: case.__name__,
)
def test_one_program_serves_all_sizes(case: Callable[[int, int], Case]) -> None:
    for number, (rows, width) in enumerate(SIZES):
        kernel, formula, inputs, rtol = case(rows, width)
        if not rows and case in (rotated_norm, read):
            continue  # the formulas cannot
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            assert_same(kernel, formula, inputs, rtol)


def test_one_program_serves_all_limits_strides_and_what_learns() -> None:
    """Numbers of a config are no constants of a program, which outlives the run on disk."""
    from model.kernels.swiglu import compiled

    for first, limit in ((True, LIMIT), (False, 3 * LIMIT)):
        grads = []
        for function in (compiled.clamped_swiglu, eager_clamped_swiglu):
            gate, up = (rand(24, 61, seed=seed, scale=4).mT for seed in (1, 2))
            if first:
                gate, up = gate.contiguous().requires_grad_(), up.contiguous()
            with torch._dynamo.config.patch(error_on_recompile=not first):
                function(gate, up.requires_grad_(), limit).sum().backward()
            grads.append(up.grad)
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_dtypes_are_those_of_the_inputs() -> None:
    """Of one row, which runs as it stands: bf16 in, bf16 out, and gradients likewise."""
    from model.kernels.hyper_connection.compiled import write_streams
    from model.kernels.norm.compiled import rms_norm
    from model.kernels.swiglu.compiled import clamped_swiglu

    def case(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return rand(*shape, seed=1).to(dtype).requires_grad_()

    fp32 = torch.float32
    x, weight, streams = case(1, 8), case(8, dtype=fp32), case(1, 3, 8)
    post, comb = case(1, 3, dtype=fp32), case(1, 3, 3, dtype=fp32)
    for out in (
        rms_norm(x, weight, EPS, None, torch.bfloat16),
        rms_norm(x, weight, EPS, turn(1, 4), torch.bfloat16),
        clamped_swiglu(x, x, LIMIT, case(1, dtype=fp32)),
        write_streams(streams, x, post, comb),
    ):
        assert out.dtype == torch.bfloat16
        out.sum().backward()
    wide = [t.detach().double() for t in (streams, x, post, comb)]
    near = {"rtol": 8e-3, "atol": 8e-3}  # one rounding to bf16
    torch.testing.assert_close(out.double(), naive_write_streams(*wide), **near)
