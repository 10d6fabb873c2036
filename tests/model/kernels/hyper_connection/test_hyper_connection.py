"""Hyper-connections against loops over streams and tokens in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.kernels.hyper_connection import collapse_streams, read_streams, write_streams
from model.kernels.hyper_connection.eager import coefficients, sinkhorn
from model.kernels.hyper_connection.naive import (
    naive_collapse_streams,
    naive_read_streams,
    naive_sinkhorn,
    naive_write_streams,
)
from tests.model.kernels.compare import assert_same, rand

NORM_EPS, HC_EPS, ITERATIONS = 1e-2, 1e-3, 20
"""Both eps are far larger than V4's, so that a forgotten one shows."""
TOKENS, DIM = 7, 6


def naive_read(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return naive_read_streams(*inputs, NORM_EPS, HC_EPS, ITERATIONS)


def parameters(streams: int) -> list[Tensor]:
    rows = (2 + streams) * streams
    fn = rand(rows, streams * DIM, seed=2)
    return [rand(TOKENS, streams, DIM, seed=1), fn, rand(rows, seed=3), rand(3, seed=4)]


def kernel_read(*inputs: Tensor):
    return read_streams(*inputs, norm_eps=NORM_EPS, hc_eps=HC_EPS, iterations=ITERATIONS)


@pytest.mark.parametrize("streams", [1, 2, 3, 4])
def test_read(streams):
    assert_same(kernel_read, naive_read, parameters(streams), rtol=3e-5)


@pytest.mark.parametrize("streams", [1, 3, 4])
def test_write(streams):
    inputs = [
        rand(TOKENS, streams, DIM, seed=1),
        rand(TOKENS, DIM, seed=2),
        rand(TOKENS, streams, seed=3),
        rand(TOKENS, streams, streams, seed=4),
    ]
    assert_same(write_streams, naive_write_streams, inputs, rtol=1e-5)


@pytest.mark.parametrize("streams", [1, 4])
def test_collapse(streams):
    inputs = [
        rand(TOKENS, streams, DIM, seed=1),
        rand(streams, streams * DIM, seed=2),
        rand(streams, seed=3),
        rand(1, seed=4),
    ]

    def kernel(*x: Tensor) -> Tensor:
        return collapse_streams(*x, norm_eps=NORM_EPS, hc_eps=HC_EPS)

    naive = lambda *x: naive_collapse_streams(*x, NORM_EPS, HC_EPS)  # noqa: E731
    assert_same(kernel, naive, inputs, rtol=1e-5)


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_sinkhorn(iterations, eps):
    assert_same(
        lambda x: sinkhorn(x, eps, iterations),
        lambda x: naive_sinkhorn(x, eps, iterations),
        [rand(9, 4, 4, scale=2)],
        rtol=1e-4,
    )


def test_sinkhorn_gradient_by_finite_differences():
    logits = rand(2, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, 1e-3, 5), (logits,))


def test_sinkhorn_ends_doubly_stochastic():
    comb = sinkhorn(rand(50, 4, 4), 1e-6, 20)
    assert (comb >= 0).all()
    for dim in (1, 2):
        assert float((comb.sum(dim) - 1).abs().max()) < 1e-3


def test_coefficients_have_their_ranges():
    """pre in (eps, 1 + eps), post in (0, 2): only pre has the eps."""
    low, high = torch.full((1, 24), -100.0), torch.full((1, 24), 100.0)
    base, scale = torch.zeros(24), torch.ones(3)
    pre, post, _ = coefficients(low, base, scale, HC_EPS, ITERATIONS)
    assert pre[0].tolist() == pytest.approx([HC_EPS] * 4) and post.abs().max() < 1e-30
    pre, post, _ = coefficients(high, base, scale, HC_EPS, ITERATIONS)
    assert pre[0].tolist() == pytest.approx([1 + HC_EPS] * 4)
    assert post[0].tolist() == [2.0] * 4


def test_a_transposed_mix_is_detected():
    """The negative control: comb is not symmetric, and the sum runs over its first index."""
    streams, fn, base, scale = parameters(4)
    _, post, comb = kernel_read(streams, fn, base, scale)
    y = rand(TOKENS, DIM, seed=5)
    right = naive_write_streams(*(x.double() for x in (streams, y, post, comb)))
    wrong = naive_write_streams(*(x.double() for x in (streams, y, post, comb.transpose(1, 2))))
    ours = write_streams(streams, y, post, comb).double()
    assert float((ours - right).abs().max()) < 1e-5 < 1e-2 < float((ours - wrong).abs().max())


def test_coefficients_of_bf16_streams_are_fp32():
    streams, fn, base, scale = parameters(4)
    streams = streams.bfloat16()
    x, post, comb = kernel_read(streams, fn, base, scale)
    assert x.dtype == torch.bfloat16 and post.dtype == comb.dtype == torch.float32
    _, exact_post, exact_comb = naive_read(*(t.double() for t in (streams, fn, base, scale)))
    torch.testing.assert_close(post.double(), exact_post, rtol=0, atol=1e-5)
    torch.testing.assert_close(comb.double(), exact_comb, rtol=0, atol=1e-5)
    assert write_streams(streams, x, post, comb).dtype == torch.bfloat16


def test_bf16_gradients():
    streams, fn, base, scale = parameters(4)
    # Only the streams are bf16: the parameters never are.
    leaf = streams.bfloat16().requires_grad_()
    outputs = kernel_read(leaf, fn, base, scale)
    sum((out.float() * rand(*out.shape, seed=9)).sum() for out in outputs).backward()
    exact = streams.bfloat16().double().requires_grad_()
    outputs = naive_read(exact, *(t.double() for t in (fn, base, scale)))
    sum((out * rand(*out.shape, seed=9).double()).sum() for out in outputs).backward()
    error = (leaf.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert float(error) < 2e-2
