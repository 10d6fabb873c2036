"""The losses of training on own samples, in place of the main head's cross-entropy.

Only the tokens of answers take part: the logits of prompts and padding are never formed. What other
models made of a step's microbatches is looked up by the number of the microbatch, which is a signal
of its positions.

Letters: T queries of a rank, n of them that predict a token of an answer, D hidden size, v
vocabulary of a tensor rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model import IGNORE_INDEX
from trainer.config.post import PostConfig
from trainer.parallel.collectives import all_reduce_, all_reduce_max_
from trainer.parallel.grid import Grid
from trainer.post.chosen_tokens import log_probabilities
from trainer.post.divergence import reverse_kl
from trainer.post.policy import policy_loss


@dataclass(frozen=True)
class Answers:
    """The tokens of answers in a microbatch.

    Attributes:
        hidden_nD, weight_vD: from which they are predicted.
        target_n: their ids.
        sampler_log_p_n: their log-probabilities when they were drawn.
        advantage_n: those of their samples.
        number: of the microbatch; None without tokens.
    """

    hidden_nD: Tensor
    weight_vD: Tensor
    target_n: Tensor
    sampler_log_p_n: Tensor
    advantage_n: Tensor
    number: int | None


class OwnObjective(ABC):
    """A loss over the answers; sums up statistics of a step over its microbatches.

    `names` are those of the sums that a subclass has, each over tokens.
    """

    names: Sequence[str]

    def __init__(self, config: PostConfig, grid: Grid) -> None:
        self._config, self._grid = config, grid
        self._sums = torch.zeros(2 + len(self.names), dtype=torch.float64, device=grid.device)
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
        answers = Answers(
            hidden_TD.index_select(0, chosen_n),
            weight_VD,
            targets_T[chosen_n],
            signals["sampler_log_p"][chosen_n],
            signals["advantage"][chosen_n],
            int(signals["number"][0]) if len(chosen_n) else None,
        )
        loss, log_p_n, sums = self.loss(answers, denominator)
        gap_n = (log_p_n.detach() - answers.sampler_log_p_n).abs().double()
        tokens = torch.full((), len(chosen_n), dtype=torch.float64, device=gap_n.device)
        self._sums += torch.stack([tokens, gap_n.sum(), *sums])
        if len(chosen_n):
            self._largest = torch.maximum(self._largest, gap_n.max())
        return loss

    @abstractmethod
    def loss(self, answers: Answers, denominator: float) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Returns the loss, the tokens' log-probabilities [n], and the sums of `names`."""

    def take(self) -> dict[str, float]:
        """Returns the statistics of the step over all ranks, and begins another one.

        Every rank calls it.
        """
        if not self._grid.tensor.is_first:  # each tensor rank has the full sums
            self._sums.zero_()
        tokens, gap, *sums = all_reduce_(self._sums, self._grid.world).tolist()
        largest = float(all_reduce_max_(self._largest, self._grid.world))
        self._sums.zero_()
        self._largest.zero_()
        tokens = max(tokens, 1.0)
        means = {name: value / tokens for name, value in zip(self.names, sums, strict=True)}
        return {"log_p_gap": gap / tokens, "log_p_gap_max": largest, **means}

    def _log_p(self, answers: Answers) -> Tensor:
        return log_probabilities(
            answers.hidden_nD,
            answers.weight_vD,
            answers.target_n,
            self._grid.tensor,
            self._config.temperature,
        )


class PolicyObjective(OwnObjective):
    """The loss of policy optimisation.

    Attributes:
        reference: the tokens' log-probabilities in the reference, on the host, by microbatch.
    """

    names = ("clipped_share", "kl")
    reference: Sequence[Tensor] = ()

    def loss(self, answers: Answers, denominator: float) -> tuple[Tensor, Tensor, list[Tensor]]:
        log_p_n = self._log_p(answers)
        policy, reference_n = self._config.policy, None
        if policy.kl_weight:
            reference_n = log_p_n.detach()
            if answers.number is not None:
                reference_n = self.reference[answers.number].to(log_p_n.device)
        loss, stats = policy_loss(
            log_p_n,
            answers.sampler_log_p_n,
            answers.advantage_n,
            torch.ones_like(answers.target_n, dtype=torch.bool),
            denominator,
            policy,
            reference_n,
        )
        return loss, log_p_n, [stats.clipped, stats.kl]


@dataclass(frozen=True)
class TeacherHidden:
    """What a microbatch learns from.

    Attributes:
        hidden_nd: the teacher's hidden states at the tokens of answers, on the host.
        weight_vd: this rank's rows of the teacher's head.
    """

    hidden_nd: Tensor
    weight_vd: Tensor


class DistillationObjective(OwnObjective):
    """The reverse KL to the teachers, over the whole vocabulary.

    Attributes:
        teachers: by microbatch.
    """

    names = ("kl",)
    teachers: Sequence[TeacherHidden] = ()

    def loss(self, answers: Answers, denominator: float) -> tuple[Tensor, Tensor, list[Tensor]]:
        with torch.no_grad():
            log_p_n = self._log_p(answers)
        # Without tokens any teacher gives 0.
        teacher = TeacherHidden(answers.hidden_nD.detach(), answers.weight_vD.detach())
        if answers.number is not None:
            teacher = self.teachers[answers.number]
        loss = reverse_kl(
            answers.hidden_nD,
            answers.weight_vD,
            teacher.hidden_nd.to(answers.hidden_nD.device),
            teacher.weight_vd,
            torch.ones_like(log_p_n),
            denominator,
            self._grid.tensor,
        )
        return loss, log_p_n, [loss.detach().double() * denominator]
