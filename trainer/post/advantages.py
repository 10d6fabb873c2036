"""Rewards of a group of samples to advantages, and the length penalty.

Letters: P prompts, K samples of each.
"""

from __future__ import annotations

from torch import Tensor

from data.text.messages import Effort
from trainer.config.post import LengthPenaltyConfig


def group_advantages(rewards_PK: Tensor, divide_by_std: bool = False) -> Tensor:
    """Returns each reward less the mean of its group, fp64 [P, K].

    A group of equal rewards gets exact zeros. Dividing by the group's standard deviation (as
    DeepSeekMath's GRPO, arXiv 2402.03300 §4.1.1) weights prompts by difficulty: those that nearly
    always or nearly never succeed count most. Without it, as in DeepSeek-V3.2, the expected
    gradient is (1 - 1/K) times that of the expected reward.
    """
    rewards_PK = rewards_PK.double()
    is_constant_P1 = rewards_PK.amin(-1, keepdim=True) == rewards_PK.amax(-1, keepdim=True)
    advantages_PK = rewards_PK - rewards_PK.mean(-1, keepdim=True)
    if divide_by_std:
        advantages_PK = advantages_PK / rewards_PK.std(-1, correction=0, keepdim=True)
    return advantages_PK.masked_fill(is_constant_P1, 0.0)


def length_penalty(tokens: int, effort: Effort, config: LengthPenaltyConfig) -> float:
    """Returns what a sample of this length loses of its reward in this mode of thinking.

    0 up to the mode's `free` tokens, then linear up to `weight` at its `limit`, and constant
    beyond.
    """
    rule = config.of(effort)
    excess = (tokens - rule.free) / (rule.limit - rule.free)
    return rule.weight * min(max(excess, 0.0), 1.0)
