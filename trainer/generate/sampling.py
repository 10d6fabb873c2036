"""Choosing the next token, with and without a draft of it.

B sequences; V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import ConfigError
from trainer.process.errors import ExportError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_p: only the most likely tokens are kept, as few as have this probability together.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}; it should be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it should be above 0 and at most 1")


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Returns the distributions from which tokens are drawn, fp32 [B, V].

    At temperature 0 the most likely token (the first of equal ones) has probability 1. Raises
    ExportError at other temperatures where logits are not finite.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature == 0:
        best_B1 = logits_BV.argmax(-1, keepdim=True)
        return torch.zeros_like(logits_BV).scatter_(1, best_B1, 1.0)
    # The smallest number that a division does not make infinite.
    temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)
    highest_B1 = logits_BV.amax(-1, keepdim=True)
    if not highest_B1.isfinite().all():
        raise ExportError("the model's logits are NaN or infinite, so no token can be drawn")
    chances_BV = ((logits_BV - highest_B1) / temperature).softmax(-1)
    if sampling.top_p >= 1:
        return chances_BV
    sorted_BV, order_BV = chances_BV.sort(dim=-1, descending=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    kept_BV = sorted_BV.masked_fill(before_BV >= sampling.top_p, 0.0)
    chances_BV = torch.zeros_like(chances_BV).scatter_(1, order_BV, kept_BV)
    return chances_BV / chances_BV.sum(-1, keepdim=True)


def draw(chances_BV: Tensor, generator: torch.Generator) -> Tensor:
    """Returns a token for each distribution, int64 [B]."""
    return torch.multinomial(chances_BV, 1, generator=generator)[:, 0]


def draw_at(chances_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Returns the tokens at which the cumulated distributions pass numbers in [0, 1), int64 [B].

    Uniform numbers give tokens of these distributions, each a function of its own number alone.
    """
    cumulated_BV = chances_BV.double().cumsum(-1)
    aim_B1 = (uniform_B * cumulated_BV[:, -1])[:, None]
    token_B = torch.searchsorted(cumulated_BV, aim_B1, right=True)[:, 0]
    return token_B.clamp_(max=chances_BV.shape[1] - 1)


def accept_drafts(
    drafts_B: Tensor, draft_chances_BV: Tensor, chances_BV: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Decides which drafts stay, such that tokens are distributed as without drafts.

    A draft d drawn from q stays with probability min(1, p(d) / q(d)); otherwise the token is drawn
    from the part of p above q (Leviathan et al. 2023, speculative sampling).

    Args:
        drafts_B: tokens drawn from `draft_chances_BV`, q.
        chances_BV: the model's distributions p at the same positions.

    Returns:
        accepted: bool [B].
        tokens: int64 [B], the draft where it is accepted, else the token in its place.
    """
    p_B, q_B = (x.gather(1, drafts_B[:, None])[:, 0] for x in (chances_BV, draft_chances_BV))
    uniform_B = torch.rand(p_B.shape, generator=generator, device=p_B.device)
    accepted_B = uniform_B * q_B < p_B
    above_BV = (chances_BV - draft_chances_BV).clamp_min(0.0)
    # Nothing is above q only where p equals q, and there every draft is accepted.
    empty_B1 = above_BV.sum(-1, keepdim=True) == 0
    others_B = draw(torch.where(empty_B1, chances_BV, above_BV), generator)
    return accepted_B, torch.where(accepted_B, drafts_B, others_B)
