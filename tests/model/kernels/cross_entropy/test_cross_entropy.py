"""Chunked cross-entropy of a linear head against torch's on whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.kernels.cross_entropy import linear_cross_entropy
from model.kernels.cross_entropy.naive import naive_linear_cross_entropy
from tests.model.kernels.compare import assert_same, rand

IGNORE_INDEX = -100


def targets_of(tokens: int, vocab: int, ignored: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    return targets.masked_fill(torch.rand(tokens, generator=generator) < ignored, IGNORE_INDEX)


def naive(hidden: Tensor, weight: Tensor, target: Tensor, denominator: float) -> Tensor:
    return naive_linear_cross_entropy(hidden, weight, target, denominator, IGNORE_INDEX)


# The last two have more logits than a chunk; in one of them the rest is a single token.
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 5), (37, 97), (1500, 3001), (513, 8192)])
@pytest.mark.parametrize("denominator", [1, 40.0])
def test_equals_whole_logits(tokens, vocab, denominator):
    target = targets_of(tokens, vocab, 0.0 if tokens == 1 else 0.3)
    assert_same(
        lambda h, w: linear_cross_entropy(h, w, target, denominator, IGNORE_INDEX),
        lambda h, w: naive(h, w, target, denominator),
        [rand(tokens, 8, seed=1), rand(vocab, 8, seed=2)],
        rtol=1e-5,
    )


def test_the_mean_over_predictions_is_torch_s_default():
    hidden, weight, target = rand(50, 8, seed=1), rand(31, 8, seed=2), targets_of(50, 31)
    count = int((target != IGNORE_INDEX).sum())
    ours = linear_cross_entropy(hidden, weight, target, count, IGNORE_INDEX)
    expected = F.cross_entropy(hidden @ weight.T, target, ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_gradients_scale_with_what_comes_from_above():
    target = targets_of(50, 31)

    def scaled(factor: float) -> list[Tensor]:
        hidden, weight = (rand(n, 8, seed=n).requires_grad_() for n in (50, 31))
        (factor * linear_cross_entropy(hidden, weight, target, 9, IGNORE_INDEX)).backward()
        return [hidden.grad, weight.grad]

    for one, three in zip(scaled(1.0), scaled(3.0), strict=True):
        torch.testing.assert_close(3 * one, three)


def test_ignored_tokens_have_no_part():
    target = torch.tensor([3, IGNORE_INDEX, 5, IGNORE_INDEX])
    hidden, weight = rand(4, 8, seed=1).requires_grad_(), rand(11, 8, seed=2).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, target, 2, IGNORE_INDEX)
    loss.backward()
    assert (hidden.grad[[1, 3]] == 0).all() and (hidden.grad[[0, 2]] != 0).any(1).all()
    moved = hidden.detach().clone()
    moved[[1, 3]] = 100.0
    assert torch.equal(
        linear_cross_entropy(moved, weight.detach(), target, 2, IGNORE_INDEX), loss.detach()
    )


def test_nothing_to_predict():
    hidden, weight = rand(4, 8, seed=1).requires_grad_(), rand(11, 8, seed=2).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full((4,), IGNORE_INDEX), 1, IGNORE_INDEX)
    loss.backward()
    assert float(loss.detach()) == 0
    assert hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


@pytest.mark.parametrize("frozen", ["both", "hidden", "weight", "no_grad"])
def test_without_some_or_all_gradients(frozen):
    target = targets_of(50, 31)
    hidden = rand(50, 8, seed=1).requires_grad_(frozen not in ("both", "hidden"))
    weight = rand(31, 8, seed=2).requires_grad_(frozen not in ("both", "weight"))
    with torch.set_grad_enabled(frozen != "no_grad"):
        loss = linear_cross_entropy(hidden, weight, target, 9, IGNORE_INDEX)
    expected = naive(hidden.double(), weight.double(), target, 9)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert loss.requires_grad == (frozen in ("hidden", "weight"))
    if loss.requires_grad:
        loss.backward()
        assert (hidden.grad is None) == (frozen == "hidden")
        assert (weight.grad is None) == (frozen == "weight")


def test_evaluation_does_not_pay_for_gradients():
    hidden, weight = (rand(n, 8, seed=n).requires_grad_() for n in (50, 31))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, targets_of(50, 31), 9, IGNORE_INDEX)
    assert counter.get_total_flops() == 2 * 50 * 31 * 8


def test_large_logits_stay_finite():
    hidden, weight = rand(5, 8, scale=1e3).requires_grad_(), rand(11, 8, seed=2, scale=1e2)
    loss = linear_cross_entropy(hidden, weight, targets_of(5, 11, 0.0), 5, IGNORE_INDEX)
    loss.backward()
    assert loss.isfinite() and hidden.grad.isfinite().all()


def test_bf16():
    target = targets_of(50, 31)
    inputs = [rand(50, 8, seed=1).bfloat16(), rand(31, 8, seed=2).bfloat16()]
    assert linear_cross_entropy(*inputs, target, 9, IGNORE_INDEX).dtype == torch.float32
    assert_same(
        lambda h, w: linear_cross_entropy(h, w, target, 9, IGNORE_INDEX),
        lambda h, w: naive(h, w, target, 9),
        inputs,
        rtol=2e-2,
    )
