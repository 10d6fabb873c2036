"""Policy optimisation against exact references: every sequence of a small vocabulary."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from model import IGNORE_INDEX
from model.kernels import cross_entropy
from tests.distributed import spawn
from trainer.config.post import LengthPenaltyConfig, PolicyConfig
from trainer.parallel.degrees import Degrees
from trainer.parallel.grid import Grid
from trainer.post import group_advantages, length_penalty, log_probabilities, policy_loss

ALONE = Grid.single().tensor
VOCAB, LENGTH, END = 3, 3, 2
ON_POLICY = PolicyConfig()


def sequences() -> list[tuple[int, ...]]:
    """Every sequence that ends at its first END, or at LENGTH tokens."""
    every = {
        tokens[: tokens.index(END) + 1] if END in tokens else tokens
        for tokens in product(range(VOCAB), repeat=LENGTH)
    }
    return sorted(every)


SEQUENCES = sequences()
REWARDS = torch.tensor([(3 * n) % 7 / 7 for n in range(len(SEQUENCES))], dtype=torch.float64)


def random_policy(seed: int) -> Tensor:
    """Logits of the next token by position and token before, [LENGTH, VOCAB + 1, VOCAB]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (LENGTH, VOCAB + 1, VOCAB)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def token_log_p(policy: Tensor, tokens: tuple[int, ...]) -> Tensor:
    log_p = policy.log_softmax(-1)
    before = (VOCAB, *tokens)
    return torch.stack([log_p[t, before[t], token] for t, token in enumerate(tokens)])


def gradient(value: Tensor, policy: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(value, policy)
    return grad


def expected_reward_gradient(policy: Tensor) -> Tensor:
    chances = torch.stack([token_log_p(policy, s).sum().exp() for s in SEQUENCES])
    torch.testing.assert_close(chances.sum(), torch.ones((), dtype=torch.float64))
    return gradient((chances * REWARDS).sum(), policy)


def loss_of(
    policy: Tensor, sampler: Tensor, group: list[int], advantages: Tensor, config: PolicyConfig
) -> Tensor:
    """The loss of a group of sequences, all of their tokens in one row, denominator 1."""
    log_p = torch.cat([token_log_p(policy, SEQUENCES[i]) for i in group])
    old = torch.cat([token_log_p(sampler, SEQUENCES[i]) for i in group]).detach()
    lengths = torch.tensor([len(SEQUENCES[i]) for i in group])
    mask = torch.ones(len(log_p), dtype=torch.bool)
    per_token = advantages.repeat_interleave(lengths)
    return policy_loss(log_p, old, per_token, mask, 1.0, config)[0]


def test_expected_gradient_of_all_groups_is_that_of_the_expected_reward() -> None:
    """Every pair of samples with its probability; the baseline has the sample itself in it."""
    policy = random_policy(0).requires_grad_()
    exact = expected_reward_gradient(policy)
    chances = torch.stack([token_log_p(policy, s).sum().exp() for s in SEQUENCES]).detach()
    total = torch.zeros_like(policy)
    for pair in product(range(len(SEQUENCES)), repeat=2):
        advantages = group_advantages(REWARDS[list(pair)][None])[0]
        loss = loss_of(policy, policy, list(pair), advantages, ON_POLICY)
        total -= gradient(loss, policy) * chances[list(pair)].prod() / 2
    torch.testing.assert_close(total, exact * (1 - 1 / 2), rtol=1e-10, atol=1e-13)


def test_older_samples_are_weighted_by_their_ratio_at_one_token() -> None:
    """Samples of another policy, without clipping: the gradient is still that of the reward."""
    policy, sampler = random_policy(1).requires_grad_(), random_policy(2)
    rewards = torch.tensor([0.1, 0.9, 0.4], dtype=torch.float64)
    config = PolicyConfig(clip_low=1.0, clip_high=1e6)
    log_p = policy.log_softmax(-1)[0, 0]
    old = sampler.log_softmax(-1)[0, 0]
    total = torch.zeros_like(policy)
    for token in range(VOCAB):
        mask = torch.ones(1, dtype=torch.bool)
        part = slice(token, token + 1)
        loss, _ = policy_loss(log_p[part], old[part], rewards[part], mask, 1.0, config)
        (grad,) = torch.autograd.grad(loss, policy, retain_graph=True)
        total -= grad * old[token].exp()
    exact = gradient((log_p.exp() * rewards).sum(), policy)
    torch.testing.assert_close(total, exact, rtol=1e-10, atol=1e-13)


def test_kl_to_the_reference_and_its_gradient_are_exact_in_the_mean() -> None:
    policy, sampler, reference = (random_policy(seed) for seed in (3, 4, 5))
    policy.requires_grad_()
    config = PolicyConfig(kl_weight=1.0)
    log_p, old, other = (p.log_softmax(-1)[0, 0] for p in (policy, sampler, reference))
    mask = torch.ones(VOCAB, dtype=torch.bool)
    terms = []
    for token in range(VOCAB):
        part = slice(token, token + 1)
        nothing = torch.zeros(1)
        loss, _ = policy_loss(log_p[part], old[part], nothing, mask[part], 1.0, config, other[part])
        terms.append(loss * old[token].exp())
    exact = (log_p.exp() * (log_p - other)).sum()
    torch.testing.assert_close(sum(terms), exact, rtol=1e-10, atol=1e-13)
    first = torch.autograd.grad(sum(terms), policy, retain_graph=True)[0]
    torch.testing.assert_close(first, gradient(exact, policy), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("divide", [False, True])
def test_advantages_sum_to_zero_and_a_constant_reward_moves_nothing(divide: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    rewards = torch.rand(50, 7, generator=generator, dtype=torch.float64)
    rewards[3] = 0.1  # whose mean is another number in floating point
    assert rewards[3].mean() != rewards[3, 0]
    advantages = group_advantages(rewards, divide)
    assert advantages.sum(-1).abs().max() < 1e-12
    assert (advantages[3] == 0).all()
    spread = advantages[4].std(correction=0)
    assert abs(spread - (1.0 if divide else rewards[4].double().std(correction=0))) < 1e-9
    policy, sampler = random_policy(1).requires_grad_(), random_policy(2) * 1e3
    loss = loss_of(policy, sampler, [0, 3], advantages[3, :2], ON_POLICY)
    assert not gradient(loss, policy).any()


@pytest.mark.parametrize(
    "ratio, advantage, moves",
    [
        (1.0, 1.0, True),
        (1.19, 1.0, True),
        (1.31, 1.0, False),
        (0.5, 1.0, True),
        (1.29, 1.0, True),
        (0.79, -1.0, False),
        (0.81, -1.0, True),
        (1.5, -1.0, True),
    ],
)
def test_clipping_at_its_borders(ratio: float, advantage: float, moves: bool) -> None:
    config = PolicyConfig(clip_low=0.2, clip_high=0.3)
    log_p = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    mask = torch.ones(1, dtype=torch.bool)
    advantages = torch.tensor([advantage])
    loss, stats = policy_loss(log_p, torch.zeros(1), advantages, mask, 1.0, config)
    loss.backward()
    assert log_p.grad is not None
    assert log_p.grad.item() == pytest.approx(-ratio * advantage if moves else 0.0)
    assert stats.clipped == (not moves)
    bounded = ratio if moves else (1.3 if advantage > 0 else 0.8)
    assert loss.item() == pytest.approx(-bounded * advantage)


def test_tokens_outside_of_the_mask_count_nowhere() -> None:
    config = PolicyConfig(kl_weight=0.1)
    log_p = torch.tensor([-1.0, float("nan"), -2.0], requires_grad=True)
    old = torch.tensor([-1.5, -1.0, -2.0])
    mask = torch.tensor([True, False, True])
    loss, stats = policy_loss(log_p, old, torch.ones(3), mask, 2.0, config, old)
    assert loss.isfinite()
    assert stats.tokens == 2
    assert stats.gap == pytest.approx(0.5)
    assert stats.squared_gap == pytest.approx(0.25)


def test_a_ratio_beyond_all_bounds_stays_finite() -> None:
    log_p = torch.tensor([-1.0], requires_grad=True)
    mask = torch.ones(1, dtype=torch.bool)
    for advantage in (-1.0, 0.0, 1.0):
        loss, _ = policy_loss(
            log_p, torch.tensor([-500.0]), torch.tensor([advantage]), mask, 1.0, ON_POLICY
        )
        (grad,) = torch.autograd.grad(loss, log_p)
        assert loss.isfinite() and grad == 0


def test_length_penalty_is_weakest_for_max() -> None:
    config = LengthPenaltyConfig.model_validate(
        {
            "none": {"free": 10, "limit": 20, "weight": 0.5},
            "high": {"free": 10, "limit": 40, "weight": 0.4},
            "max": {"free": 20, "limit": 80, "weight": 0.2},
        }
    )
    assert [length_penalty(n, "none", config) for n in (0, 10, 15, 20, 99)] == [
        0,
        0,
        0.25,
        0.5,
        0.5,
    ]
    for tokens in range(0, 100, 5):
        losses = [length_penalty(tokens, effort, config) for effort in ("none", "high", "max")]
        assert losses == sorted(losses, reverse=True)
    with pytest.raises(ValidationError, match="max should not be penalised more than high"):
        LengthPenaltyConfig.model_validate({"max": {"weight": 0.1}})
    with pytest.raises(ValidationError, match="limit = 5 should be above free = 9"):
        LengthPenaltyConfig.model_validate({"none": {"free": 9, "limit": 5}})


# Log-probabilities of chosen tokens.

WIDTH, SIZE, TOKENS = 8, 24, 21


def head_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(0, SIZE, (TOKENS,), generator=generator)
    target[::4] = IGNORE_INDEX
    return {
        "hidden": torch.randn(TOKENS, WIDTH, generator=generator),
        "weight": torch.randn(SIZE, WIDTH, generator=generator) * 8,
        "target": target,
        "grad": torch.randn(TOKENS, generator=generator),
    }


def results(function: Any, x: dict[str, Tensor], *args: Any) -> dict[str, Tensor]:
    leaves = {
        n: t.clone().requires_grad_() if n in ("hidden", "weight") else t for n, t in x.items()
    }
    value = function(leaves["hidden"], leaves["weight"], leaves["target"], *args)
    value.backward(x["grad"].to(value.dtype))
    grads = {name: leaves[name].grad for name in ("hidden", "weight")}
    return {"value": value.detach(), **grads}


def naive_log_p(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> Tensor:
    log_p = (hidden @ weight.t() / temperature).log_softmax(-1)
    chosen = log_p.gather(1, target.clamp_min(0)[:, None])[:, 0]
    return chosen.masked_fill(target == IGNORE_INDEX, 0.0)


def sharded(rank: int, world_size: int, x: dict[str, Tensor], temperature: float) -> Any:
    cross_entropy.CPU_LOGITS = 5 * SIZE // world_size
    axis = Grid.build(Degrees(world_size, tensor=world_size), torch.device("cpu")).tensor
    rows = slice(rank * SIZE // world_size, (rank + 1) * SIZE // world_size)
    return results(log_probabilities, dict(x, weight=x["weight"][rows]), axis, temperature)


@pytest.mark.parametrize("world_size", [1, 2])
def test_log_probabilities_of_chosen_tokens(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, temperature = head_inputs(), 0.7
    wide = {n: t.double() if t.is_floating_point() else t for n, t in x.items()}
    expected = results(naive_log_p, wide, temperature)
    if world_size == 1:
        monkeypatch.setattr(cross_entropy, "CPU_LOGITS", 5 * SIZE)
        ranks = [results(log_probabilities, x, ALONE, temperature)]
    else:
        ranks = spawn(sharded, world_size, x, temperature)
    got = {
        "value": ranks[-1]["value"],
        "hidden": sum(rank["hidden"] for rank in ranks),
        "weight": torch.cat([rank["weight"] for rank in ranks]),
    }
    for name, tensor in got.items():
        difference = (tensor.double() - expected[name]).abs().max()
        assert difference <= 3e-6 * expected[name].abs().max(), name


def test_log_probabilities_by_finite_differences() -> None:
    x = head_inputs()
    leaves = [x[name].double().requires_grad_() for name in ("hidden", "weight")]
    assert torch.autograd.gradcheck(
        lambda h, w: log_probabilities(h, w, x["target"], ALONE, 0.7), leaves
    )
