"""Hyper-connections against loops over streams and tokens in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.kernels.hyper_connection.hyper_connection import (
    coefficients,
    collapse_streams,
    read_streams,
    sinkhorn,
    write_streams,
)
from tests.model.kernels.compare import assert_same, rand

NORM_EPS, HC_EPS, ITERATIONS = 1e-2, 1e-3, 20
"""Both eps are far larger than V4's, so that a forgotten one shows."""
TOKENS, DIM = 7, 6


def reference_sinkhorn(logits: Tensor, eps: float, iterations: int) -> Tensor:
    out = []
    for matrix in logits:
        matrix = matrix.exp() / matrix.exp().sum(1, keepdim=True) + eps
        matrix = matrix / (matrix.sum(0, keepdim=True) + eps)
        for _ in range(iterations - 1):
            matrix = matrix / (matrix.sum(1, keepdim=True) + eps)
            matrix = matrix / (matrix.sum(0, keepdim=True) + eps)
        out.append(matrix)
    return torch.stack(out)


def reference_weights(streams: Tensor, fn: Tensor) -> Tensor:
    flat = streams.flatten(1)
    return flat / torch.sqrt(flat.square().mean(1, keepdim=True) + NORM_EPS) @ fn.T


def reference_read(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor):
    n = streams.shape[1]
    w = reference_weights(streams, fn)
    pre = torch.sigmoid(scale[0] * w[:, :n] + base[:n]) + HC_EPS
    post = 2 * torch.sigmoid(scale[1] * w[:, n : 2 * n] + base[n : 2 * n])
    comb = (scale[2] * w[:, 2 * n :] + base[2 * n :]).view(-1, n, n)
    x = sum(pre[:, j, None] * streams[:, j] for j in range(n))
    return x, post, reference_sinkhorn(comb, HC_EPS, ITERATIONS)


def reference_write(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    n = streams.shape[1]
    return torch.stack(
        [
            post[:, k, None] * y + sum(comb[:, j, k, None] * streams[:, j] for j in range(n))
            for k in range(n)
        ],
        dim=1,
    )


def parameters(streams: int) -> list[Tensor]:
    rows = (2 + streams) * streams
    fn = rand(rows, streams * DIM, seed=2)
    return [rand(TOKENS, streams, DIM, seed=1), fn, rand(rows, seed=3), rand(3, seed=4)]


def kernel_read(*inputs: Tensor):
    return read_streams(*inputs, norm_eps=NORM_EPS, hc_eps=HC_EPS, iterations=ITERATIONS)


@pytest.mark.parametrize("streams", [1, 2, 3, 4])
def test_read(streams):
    assert_same(kernel_read, reference_read, parameters(streams), rtol=3e-5)


@pytest.mark.parametrize("streams", [1, 3, 4])
def test_write(streams):
    inputs = [
        rand(TOKENS, streams, DIM, seed=1),
        rand(TOKENS, DIM, seed=2),
        rand(TOKENS, streams, seed=3),
        rand(TOKENS, streams, streams, seed=4),
    ]
    assert_same(write_streams, reference_write, inputs, rtol=1e-5)


@pytest.mark.parametrize("streams", [1, 4])
def test_collapse(streams):
    inputs = [
        rand(TOKENS, streams, DIM, seed=1),
        rand(streams, streams * DIM, seed=2),
        rand(streams, seed=3),
        rand(1, seed=4),
    ]

    def reference(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> Tensor:
        read = torch.sigmoid(scale * reference_weights(x, fn) + base) + HC_EPS
        return sum(read[:, j, None] * x[:, j] for j in range(streams))

    def kernel(*x: Tensor) -> Tensor:
        return collapse_streams(*x, norm_eps=NORM_EPS, hc_eps=HC_EPS)

    assert_same(kernel, reference, inputs, rtol=1e-5)


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_sinkhorn(iterations, eps):
    assert_same(
        lambda x: sinkhorn(x, eps, iterations),
        lambda x: reference_sinkhorn(x, eps, iterations),
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


def test_a_transposed_mix_is_seen():
    """The negative control: comb is not symmetric, and the sum runs over its first index."""
    streams, fn, base, scale = parameters(4)
    _, post, comb = kernel_read(streams, fn, base, scale)
    y = rand(TOKENS, DIM, seed=5)
    right = reference_write(*(x.double() for x in (streams, y, post, comb)))
    wrong = reference_write(*(x.double() for x in (streams, y, post, comb.transpose(1, 2))))
    ours = write_streams(streams, y, post, comb).double()
    assert float((ours - right).abs().max()) < 1e-5 < 1e-2 < float((ours - wrong).abs().max())


def test_coefficients_of_bf16_streams_are_fp32():
    streams, fn, base, scale = parameters(4)
    streams = streams.bfloat16()
    x, post, comb = kernel_read(streams, fn, base, scale)
    assert x.dtype == torch.bfloat16 and post.dtype == comb.dtype == torch.float32
    _, exact_post, exact_comb = reference_read(*(t.double() for t in (streams, fn, base, scale)))
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
    outputs = reference_read(exact, *(t.double() for t in (fn, base, scale)))
    sum((out * rand(*out.shape, seed=9).double()).sum() for out in outputs).backward()
    error = (leaf.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert float(error) < 2e-2
