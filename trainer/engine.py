"""Forward and backward of one optimizer step on this rank, and the sums over all ranks.

Losses are token means over the global batch: the numbers of predictions are counted over all
microbatches and ranks before the first backward, every microbatch divides its sums by them, and
then losses, gradients and expert loads simply add up. So any division of the model and of its
tokens over ranks gives the same result.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from data import Batch
from model import TokenCounts
from model.config import AttentionMode
from model.execution import Objective
from model.flops import training_flops
from model.qat import fake_quantised
from optim import HybridZero, clip_
from trainer.config.phases import Quantisation
from trainer.microbatches import Microbatches, RowCopies, Rows, SelectedExperts
from trainer.parallel.collectives import all_gather_objects, all_reduce_
from trainer.parallel.grid import Grid
from trainer.parallel.pipeline_stage import Reader, StepAccumulator
from trainer.parallel.plan import LocalModel, fp32_gradients, make_pipeline

_SUMS = TokenCounts(lm=1, mtp=1, routed=1)  # denominators of 1: losses are plain sums
_WITHOUT_OBJECTIVE: dict[AttentionMode, AttentionMode] = {
    "select": "select",
    "dense": "dense",
    "warmup": "dense",
    "sparse": "select",
}


@dataclass(frozen=True)
class RankMessage:
    """What a rank reports to all others, with the token counts of a step."""

    stop: bool = False
    """It was asked to stop."""
    profile: bool = False
    """It was asked for a profile."""
    work_seconds: float = 0.0
    """How long it worked in the step before, waits for other ranks not included."""


@dataclass(frozen=True)
class Messages:
    """The messages of all ranks, the same on every rank: whether any was asked, and all seconds."""

    stop: bool = False
    profile: bool = False
    work_seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class StepLosses:
    """Losses and statistics of a global batch, the same on every rank."""

    loss: Tensor
    """The loss that was differentiated; 0-dim fp64, as the next four."""
    lm: Tensor
    mtp: Tensor
    balance: Tensor
    indexer: Tensor
    """Summed over the CSA layers; 0 where the attention has no objective."""
    expert_load: Tensor
    """[layers (+ MTP), E] fp32: tokens routed to each expert."""
    top1_weight_share: Tensor
    """[layers (+ MTP)] fp32: largest gate weight's share of a token's weights, token mean."""
    counts: TokenCounts
    """Token counts, the denominators of the losses; on the host."""
    flops: float
    """FLOPs of forward and backward over all ranks, each sample at its own length."""
    messages: Messages


_NOTHING = RankMessage()


def learns(name: str, attention: AttentionMode) -> bool:
    """Whether a parameter has a gradient in this attention mode.

    In `dense` all but the indexers' have one, in `warmup` only these, in `sparse` and `select` all;
    in `select` those of the indexers are zero, and without weight decay they stay as they are.
    """
    if attention in ("select", "sparse"):
        return True
    return (".indexer." in name) == (attention == "warmup")


class Engine(ABC):
    """Forward, backward and update; subclasses decide what runs them and where gradients are.

    Unless `quantisation` is none, forward and backward round as model/qat.py does; the update does
    not.
    """

    quantisation: Quantisation = "none"

    def __init__(self, local: LocalModel, grid: Grid) -> None:
        self.model = local.model
        self.grid = grid
        config = local.model.config
        self.attention: AttentionMode = "select"
        ratios = {config.compress_ratio(kind) for kind in config.layer_types} - {0}
        self.copies = RowCopies(grid.device, sorted(ratios))
        self._flops_of = cache(
            lambda length, attention: training_flops(config, [length], attention=attention)
        )

    def set_attention(self, attention: AttentionMode) -> None:
        """Sets the attention mode of the following steps and freezes what it does not train.

        `dense` freezes the indexers, `warmup` everything else; `select` and `sparse` nothing.
        Frozen parameters have no gradient, and the optimizer does not touch them or their state.
        """
        if attention == self.attention:
            return
        self.attention = attention
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(learns(name, attention))
        self.make_gradients()

    @abstractmethod
    def make_gradients(self) -> None:
        """Allocates the gradients of the parameters that are trained, and of no others."""

    @abstractmethod
    def compute(
        self, microbatches: Microbatches, accumulator: StepAccumulator, backward: bool
    ) -> None:
        """Does the work of `run` on the weights as they are."""

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """Returns the norm of the whole model's gradient, 0-dim fp32; every rank calls it."""

    @abstractmethod
    def where_not_finite(self) -> str:
        """Returns which gradient is not finite, as a clause; every rank calls it."""

    @abstractmethod
    def step(self, learning_rate: float, norm: Tensor) -> None:
        """Clips a gradient of this norm and updates the weights."""

    @abstractmethod
    def skip(self) -> None:
        """Drops the gradient of a backward without an update."""

    def run(self, microbatches: Microbatches, accumulator: StepAccumulator, backward: bool) -> None:
        """Runs forward of all microbatches into `accumulator`, and backward if asked.

        After backward the optimizer holds the gradient of the sum over all ranks, which replaces
        any earlier one.
        """
        with self.computing():
            self.compute(microbatches, accumulator, backward)

    def computing(self) -> AbstractContextManager[None]:
        """Returns a context with the weights that forward and backward use."""
        if self.quantisation == "none":
            return nullcontext()
        return fake_quantised(self.model, kv=self.quantisation == "mxfp4")

    def forward_backward(
        self,
        batches: Sequence[Batch],
        mtp_loss_weight: float | None = None,
        message: RankMessage = _NOTHING,
        experts: Sequence[SelectedExperts] | None = None,
        objective: Objective | None = None,
    ) -> StepLosses:
        """Computes the gradient of the global token mean, for the optimizer to apply.

        `batches` are this rank's microbatches of the step. `message` travels with the token counts.
        `experts` were selected for them by `select_experts`, perhaps with
        earlier weights. `objective`: the main head's loss, by default cross-entropy.
        """
        weight = self.model.config.mtp_loss_weight if mtp_loss_weight is None else mtp_loss_weight
        accumulator = StepAccumulator.zeros(self.model, self.grid.device)
        with self.copies.rows(batches) as rows:
            counts, flops, messages = self._agree(rows, self._count_flops(batches), message)
            microbatches = Microbatches(
                self.model, rows, counts, weight, self.attention, experts, objective
            )
            self.run(microbatches, accumulator, backward=True)
        total = self._sum_over_ranks(accumulator)
        lm, mtp, balance, indexer = total.losses.unbind(0)
        loss = lm + weight * mtp + balance + indexer
        top1 = total.top1_weight_share / max(counts.routed, 1)
        return StepLosses(
            loss, lm, mtp, balance, indexer, total.load, top1, counts, flops, messages
        )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Returns the sum of the main head's losses over all ranks' microbatches, 0-dim fp64."""
        accumulator = StepAccumulator.zeros(self.model, self.grid.device)
        self._forward(batches, accumulator, self.attention)
        return self._sum_over_ranks(accumulator).losses[0]

    @torch.no_grad()
    def select_experts(
        self, batches: Sequence[Batch], attention: AttentionMode | None = None
    ) -> list[SelectedExperts]:
        """Returns the experts that learned routers select for local tokens with current weights.

        One forward pass without the output heads, by default with the current attention; every
        rank calls it.
        """
        accumulator = StepAccumulator.zeros(self.model, self.grid.device)
        experts: list[dict[int, Tensor]] = [{} for _ in batches]
        accumulator.experts = experts
        self._forward(batches, accumulator, attention or self.attention)
        return list(experts)

    @torch.no_grad()
    def read_streams(self, batches: Sequence[Batch], reader: Reader) -> None:
        """Runs forward of some microbatches without heads and losses; every rank calls it.

        `reader` gets what the last layer returns, on the ranks of the last pipeline stage.
        """
        accumulator = StepAccumulator.zeros(self.model, self.grid.device)
        accumulator.reader = reader
        self._forward(batches, accumulator, self.attention)

    def _forward(
        self, batches: Sequence[Batch], accumulator: StepAccumulator, attention: AttentionMode
    ) -> None:
        """Runs forward into `accumulator`, without the indexers' objective."""
        mode = _WITHOUT_OBJECTIVE[attention]
        with self.copies.rows(batches) as rows:
            self.run(Microbatches(self.model, rows, _SUMS, 0.0, mode), accumulator, backward=False)

    def _sum_over_ranks(self, accumulator: StepAccumulator) -> StepAccumulator:
        """Sums over all ranks; each tensor rank has the full losses of the heads."""
        if not self.grid.tensor.is_first:
            accumulator.losses[:2] = 0.0
        stats = torch.cat([accumulator.load, accumulator.top1_weight_share[:, None]], dim=1)
        losses = all_reduce_(accumulator.losses, self.grid.world)
        stats = all_reduce_(stats, self.grid.world)
        return StepAccumulator(losses, stats[:, :-1], stats[:, -1])

    def _count_flops(self, batches: Sequence[Batch]) -> float:
        """FLOPs of forward and backward, every sample at its own length."""
        return sum(
            self._flops_of(sample, self.attention)
            for batch in batches
            for row in batch.lengths
            for sample in row
        )

    def _agree(
        self, rows: list[Rows], flops: float, message: RankMessage
    ) -> tuple[TokenCounts, float, Messages]:
        """Global token counts and FLOPs, and the messages of all ranks.

        One small all-reduce on the host; fp64 holds the counts exactly. Of the ranks that read the
        same rows one counts them.
        """
        local = sum((micro.counts for micro in rows[1:]), rows[0].counts)
        sums = [local.lm, local.mtp, local.routed, flops, message.stop, message.profile]
        numbers = torch.zeros(len(sums) + self.grid.world_size, dtype=torch.float64)
        numbers[: len(sums)] = torch.tensor(sums, dtype=torch.float64)
        numbers[len(sums) + self.grid.rank] = message.work_seconds
        if not (self.grid.sequence.is_first and self.grid.pipeline.is_first):
            numbers[:4] = 0.0
        totals = all_reduce_(numbers, self.grid.world).tolist()
        lm, mtp, routed, flops, stops, profiles, *seconds = totals
        messages = Messages(stops > 0, profiles > 0, tuple(seconds))
        return TokenCounts(lm=int(lm), mtp=int(mtp), routed=int(routed)), flops, messages


class NativeEngine(Engine):
    """Runs this rank's part of the model; the optimizer sums gradients over ranks.

    Without an optimizer, gradients are those of this rank's tokens only.
    """

    def __init__(self, local: LocalModel, grid: Grid, optimizer: HybridZero | None = None) -> None:
        super().__init__(local, grid)
        self.optimizer = optimizer
        self.names = [name for name, _ in local.model.named_parameters()]
        self.gradients = fp32_gradients(local)
        self.pipeline = make_pipeline(local, grid)

    def make_gradients(self) -> None:
        self.gradients.zero_()

    def compute(
        self, microbatches: Microbatches, accumulator: StepAccumulator, backward: bool
    ) -> None:
        """Runs the pipeline schedule; gradients are sent as soon as they are complete."""
        if backward:
            self.gradients.zero_()
            if self.optimizer is not None:
                self.optimizer.expect(self._additions(len(microbatches)))
        tokens = microbatches.tokens // self.grid.sequence.size
        self.pipeline.run(microbatches, tokens, accumulator, backward)
        if backward and self.optimizer is not None:
            self.optimizer.reduce()

    def _additions(self, microbatches: int) -> dict[str, int]:
        """How often backward adds to each gradient: once per microbatch in every stage that has it.

        Schedules that compute weight gradients separately add to them outside of autograd: these
        are sent at the end.
        """
        num_stages = Counter(
            id(p) for stage in self.pipeline.stage_modules for p in stage.parameters()
        )
        return {
            name: microbatches * num_stages[id(parameter)]
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        square = self._optimizer.squared_norm().to(self.grid.device)
        return all_reduce_(square, self.grid.world).sqrt().float()

    def where_not_finite(self) -> str:
        """Returns the first parameter, in the model's order, whose gradient is not finite."""
        order = {name: (_depth(name), index) for index, name in enumerate(self.names)}
        local = [
            (*order[piece.name], piece.name)
            for piece in self._optimizer.gradients()
            if not piece.tensor.isfinite().all()
        ]
        gathered = all_gather_objects(sorted(local)[:1], self.grid.world)
        firsts = [first for of_rank in gathered for first in of_rank]
        if not firsts:
            return "all gradients are finite"
        return f"the first gradient that is not finite is that of '{min(firsts)[2]}'"

    def step(self, learning_rate: float, norm: Tensor) -> None:
        if (max_norm := self._optimizer.config.clip_norm) is not None:
            clip_(self._optimizer.owned(), norm, max_norm)
        self._optimizer.step(learning_rate)

    def skip(self) -> None:
        """Does nothing: the next backward begins with zeros."""

    @property
    def _optimizer(self) -> HybridZero:
        assert self.optimizer is not None, "an engine without an optimizer does not update"
        return self.optimizer


def _depth(name: str) -> float:
    """Orders the parts of a model that different ranks hold: embedding, layers, and the rest."""
    if name == "embed.weight":
        return -1
    return int(name.split(".")[1]) if name.startswith("layers.") else math.inf
