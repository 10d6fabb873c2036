"""Triton's softmax over the vocabulary, in its interpreter, against the naive one in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from model.kernels.cross_entropy.naive import naive_softmax_loss
from model.kernels.operations import Choice
from tests.model.kernels.compare import assert_same, rand
from tests.model.kernels.cross_entropy.test_cross_entropy import IGNORE_INDEX, naive, targets_of
from tests.model.kernels.interpreter import interpreted, last_program_first


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    from model.kernels.cross_entropy import softmax_triton

    with patch.object(softmax_triton, "_BLOCK", 16):
        yield


def softmax_loss(logits: Tensor, target: Tensor, denominator: float = 7.0, needs_grad: bool = True):
    from model.kernels.cross_entropy import softmax_triton

    return softmax_triton.softmax_loss(logits, target, denominator, IGNORE_INDEX, needs_grad)


def exact(logits: Tensor, target: Tensor, denominator: float = 7.0) -> tuple[Tensor, Tensor]:
    leaf = logits.double().requires_grad_()
    losses = naive_softmax_loss(leaf, target, IGNORE_INDEX)
    (losses.sum() / denominator).backward()
    return losses.detach(), leaf.grad


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 1), (5, 16), (9, 37), (4, 100)])
@interpreted
def test_losses_and_gradients(tokens, vocab, seed):
    logits, target = rand(tokens, vocab, seed=seed, scale=4), targets_of(tokens, vocab)
    losses, grad = softmax_loss(logits.clone(), target)
    expected, slope = exact(logits, target)
    # Some 40 roundings of fp32 on values below 16.
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(grad.double(), slope, rtol=2e-6, atol=2e-7)
    assert (losses[target == IGNORE_INDEX] == 0).all() and (grad[target == IGNORE_INDEX] == 0).all()


@interpreted
def test_16_bits_take_the_place_of_the_logits():
    """fp16, because the interpreter cuts bits off where it makes bf16 numbers."""
    logits, target = rand(9, 50, seed=1, scale=4).half(), targets_of(9, 50)
    expected, slope = exact(logits, target)
    losses, grad = softmax_loss(logits, target)
    assert grad.data_ptr() == logits.data_ptr() and grad.dtype == torch.float16
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(grad.double(), slope, rtol=2**-10, atol=2**-24)


@interpreted
def test_without_gradients_the_logits_stay():
    logits, target = rand(9, 50, seed=1), targets_of(9, 50)
    before = logits.clone()
    losses, grad = softmax_loss(logits, target, needs_grad=False)
    assert grad is None and torch.equal(logits, before)
    torch.testing.assert_close(losses.double(), exact(logits, target)[0], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("place", [0, 20, 49])
@interpreted
def test_large_logits_stay_finite_and_what_is_not_finite_is_detected(place):
    logits, target = rand(3, 50, seed=1, scale=1e4), torch.tensor([place, 49, 1])
    losses, grad = softmax_loss(logits.clone(), target)
    torch.testing.assert_close(losses.double(), exact(logits, target)[0], rtol=1e-6, atol=1e-3)
    assert grad.isfinite().all()
    for value in (torch.nan, torch.inf):
        broken = logits.clone()
        broken[1, place] = value
        losses, grad = softmax_loss(broken, target)
        assert losses[1].isnan() and grad[1].isnan().any()
        assert losses[[0, 2]].isfinite().all() and grad[[0, 2]].isfinite().all()


@interpreted
def test_the_order_of_programs_changes_no_bit():
    logits, target = rand(33, 50, seed=1), targets_of(33, 50)
    first = softmax_loss(logits.clone(), target)
    with last_program_first():
        second = softmax_loss(logits.clone(), target)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreted
def test_no_tokens():
    losses, grad = softmax_loss(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))
    assert losses.shape == (0,) and grad.shape == (0, 8)


@interpreted
def test_the_head_uses_the_kernel_that_is_chosen():
    from model.kernels import cross_entropy
    from model.kernels.cross_entropy import softmax_triton

    target = targets_of(37, 97)
    inputs = [rand(37, 8, seed=1), rand(97, 8, seed=2)]
    plain = softmax_triton.softmax_loss
    calls = []
    with (
        patch.object(cross_entropy, "CPU_LOGITS", 97 * 10),
        patch.object(softmax_triton, "softmax_loss", lambda *of: (calls.append(of), plain(*of))[1]),
    ):
        assert_same(
            lambda h, w: cross_entropy.linear_cross_entropy(
                h, w, target, 40.0, IGNORE_INDEX, Choice("triton")
            ),
            lambda h, w: naive(h, w, target, 40.0),
            inputs,
            rtol=1e-5,
        )
    assert [len(of[0]) for of in calls] == [10, 10, 10, 7]


@interpreted
def test_a_shifted_target_is_detected():
    """The negative control."""
    logits, target = rand(9, 50, seed=1), targets_of(9, 50, 0.0)
    losses, _ = softmax_loss(logits.clone(), (target + 1) % 50)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(losses.double(), exact(logits, target)[0], rtol=1e-3, atol=1e-3)
