"""The losses of training on own samples, in place of the main head's cross-entropy.

Only the tokens of answers take part: the logits of prompts and padding are never formed.

Letters: T queries of a rank, n of them that predict a token of an answer, D hidden size, v
vocabulary of a tensor rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from model import IGNORE_INDEX
from trainer.config.post import PostConfig
from trainer.parallel.collectives import all_reduce_, all_reduce_max_
from trainer.parallel.grid import Grid
from trainer.post.chosen_tokens import log_probabilities
from trainer.post.policy import policy_loss


class PolicyObjective:
    """The loss of policy optimisation; sums up statistics of a step over its microbatches."""

    def __init__(self, config: PostConfig, grid: Grid) -> None:
        self._config, self._grid = config, grid
        self._sums = torch.zeros(4, dtype=torch.float64, device=grid.device)
        self._largest = torch.zeros(1, dtype=torch.float64, device=grid.device)

    def __call__(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        signals: Mapping[str, Tensor],
        denominator: float,
    ) -> Tensor:
        chosen_n = (targets_T != IGNORE_INDEX).nonzero()[:, 0]
        target_n = targets_T[chosen_n]
        log_p_n = log_probabilities(
            hidden_TD.index_select(0, chosen_n),
            weight_VD,
            target_n,
            self._grid.tensor,
            self._config.temperature,
        )
        sampler_n = signals["sampler_log_p"][chosen_n]
        loss, stats = policy_loss(
            log_p_n,
            sampler_n,
            signals["advantage"][chosen_n],
            torch.ones_like(target_n, dtype=torch.bool),
            denominator,
            self._config.policy,
            signals["reference_log_p"][chosen_n] if self._config.policy.kl_weight else None,
        )
        self._sums += torch.stack([stats.tokens, stats.clipped, stats.gap, stats.kl])
        if len(chosen_n):
            gap_n = (log_p_n.detach() - sampler_n).abs().double()
            self._largest = torch.maximum(self._largest, gap_n.max())
        return loss

    def take(self) -> dict[str, float]:
        """Returns the statistics of the step over all ranks, and begins another one.

        Every rank calls it.
        """
        if not self._grid.tensor.is_first:  # each tensor rank has the full sums
            self._sums.zero_()
        tokens, clipped, gap, kl = all_reduce_(self._sums, self._grid.world).tolist()
        largest = float(all_reduce_max_(self._largest, self._grid.world))
        self._sums = torch.zeros_like(self._sums)
        self._largest = torch.zeros_like(self._largest)
        tokens = max(tokens, 1.0)
        return {
            "log_p_gap": gap / tokens,
            "log_p_gap_max": largest,
            "clipped_share": clipped / tokens,
            **({"kl": kl / tokens} if self._config.policy.kl_weight else {}),
        }
