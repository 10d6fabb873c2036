"""The loss of group-relative policy optimisation, token by token.

The loss is a mean over the tokens of the samples of the whole global batch, not a mean of means
over samples: a token counts the same wherever it is, as in all other losses here, and the gradient
of a step points where the policy gradient does. Dividing by the length of each sample, as GRPO
first did, lets a long wrong answer lose less per token than a short one (arXiv 2503.20783 §3.1).

Letters: T tokens (queries of this rank).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config.post import PolicyConfig

MAX_LOG_RATIO = 20.0
"""Log-ratios of probabilities are clamped to this; exp of it is far outside of every clip range."""


@dataclass(frozen=True)
class PolicyStats:
    """Sums over some tokens, fp64 0-dim; they add up over microbatches and ranks.

    Attributes:
        tokens: the number of tokens.
        clipped: how many of them have no gradient, because their ratio is outside of the range.
        gap: Σ |log-probability here - sampler's|, nats.
        squared_gap: Σ of its square.
        kl: Σ of the estimate of the KL to the reference; 0 without one.
    """

    tokens: Tensor
    clipped: Tensor
    gap: Tensor
    squared_gap: Tensor
    kl: Tensor


def policy_loss(
    log_p_T: Tensor,
    sampler_log_p_T: Tensor,
    advantage_T: Tensor,
    mask_T: Tensor,
    denominator: float,
    config: PolicyConfig,
    reference_log_p_T: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Returns Σ_t (-min(r A, clip(r) A) + kl_weight · KL) / denominator, and statistics.

    r is the ratio of the probabilities here and when sampling (arXiv 2402.03300 eq. 3). The KL to
    the reference is estimated as in DeepSeek-V3.2: r · (x - log x - 1), x the reference's
    probability over the one here ("k3", times the ratio). Its mean over samples is the KL(here ||
    reference), and so is its gradient, also where the sampler's weights are older.

    Args:
        log_p_T: of the chosen tokens, differentiable.
        sampler_log_p_T: as the sampler had them.
        advantage_T: that of each token's sample; where it is 0 only the KL has a gradient.
        mask_T: bool, the tokens that were sampled.
        denominator: the number of sampled tokens in the whole global batch.
        reference_log_p_T: needed where `kl_weight` is not 0.
    """
    gap_T = (log_p_T - sampler_log_p_T).masked_fill(~mask_T, 0.0)
    ratio_T = gap_T.clamp(max=MAX_LOG_RATIO).exp()
    advantage_T = advantage_T.to(ratio_T.dtype)
    clipped_T = ratio_T.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain_T = torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
    kl_T = torch.zeros_like(gain_T)
    if config.kl_weight:
        assert reference_log_p_T is not None
        distance_T = (reference_log_p_T - log_p_T).masked_fill(~mask_T, 0.0)
        distance_T = distance_T.clamp(max=MAX_LOG_RATIO)
        kl_T = ratio_T * (distance_T.exp() - distance_T - 1)
    loss_T = (config.kl_weight * kl_T - gain_T).masked_fill(~mask_T, 0.0)
    with torch.no_grad():
        is_clipped_T = mask_T & (clipped_T * advantage_T < ratio_T * advantage_T)
        columns = (mask_T, is_clipped_T, gap_T.abs(), gap_T.square(), kl_T)
        stats = PolicyStats(*(column.double().sum() for column in columns))
    return loss_T.sum() / denominator, stats
