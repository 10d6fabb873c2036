"""Forward and backward of one optimizer step on this rank, and the sum over all ranks.

Losses are token means over the global batch: the numbers of predictions are counted over all
microbatches and ranks before the first backward, every microbatch divides its sums by them, and
then losses, gradients and expert loads simply add up. So any number of ranks and any number of
rows in a microbatch give the same result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from data import Batch
from model import SampleLayout, TokenCounts, V4Model
from model.flops import training_flops
from trainer.parallel.collectives import FlatGradients, sum_
from trainer.parallel.grid import Grid


@dataclass(frozen=True)
class StepLosses:
    """What forward and backward of a global batch gave, the same on every rank."""

    loss: Tensor
    """0-dim fp64, as `lm`, `mtp` and `balance`: what was differentiated."""
    lm: Tensor
    mtp: Tensor
    balance: Tensor
    expert_load: Tensor
    """[L_moe, E] fp32: tokens routed to each expert."""
    counts: TokenCounts
    """The denominators, on the host."""
    flops: float
    """Operations of forward and backward over all ranks, each sample at its own length."""
    stop: bool
    """Whether any rank was asked to stop."""


@dataclass(frozen=True)
class _Microbatch:
    tokens_BS: Tensor
    targets_BS: Tensor
    layout: SampleLayout
    counts: TokenCounts
    flops: float


class NativeEngine:
    """Data parallelism: every rank holds the model, gradients are summed in flat fp32 buckets."""

    def __init__(self, model: V4Model, grid: Grid) -> None:
        self.model = model
        self.grid = grid
        self.gradients = FlatGradients(model.parameters())
        self._flops_of = cache(lambda length: training_flops(model.config, [length]))

    def forward_backward(
        self, batches: Sequence[Batch], mtp_loss_weight: float | None = None, stop: bool = False
    ) -> StepLosses:
        """Leave the gradient of the global token mean in every parameter's `.grad`.

        `batches` are this rank's microbatches of the step. `stop` travels with the token counts.
        """
        microbatches = [self._prepare(batch) for batch in batches]
        counts, flops, stop = self._agree(microbatches, stop)
        self.gradients.zero_()
        losses: Tensor | None = None
        load: Tensor | None = None
        for micro in microbatches:
            out = self.model(
                micro.tokens_BS, micro.layout, micro.targets_BS, counts, mtp_loss_weight
            )
            out.loss.backward()
            parts = (out.loss, out.lm_loss, out.mtp_loss, out.balance_loss)
            stacked = torch.stack([part.detach().double() for part in parts])
            losses = stacked if losses is None else losses + stacked
            load = out.expert_load if load is None else load + out.expert_load
        assert losses is not None and load is not None, "a rank without rows"
        sum_(losses, self.grid.data)
        sum_(load, self.grid.data)
        self.gradients.sum_(self.grid.data)
        loss, lm, mtp, balance = losses.unbind(0)
        return StepLosses(loss, lm, mtp, balance, load, counts, flops, stop)

    def _prepare(self, batch: Batch) -> _Microbatch:
        """Rows and integer ranges on the device; counts stay on the host."""
        device = self.grid.device
        length = batch.tokens.shape[1]
        on_host = SampleLayout.from_lengths(batch.lengths, length)
        on_device = on_host
        if device.type != "cpu":
            on_device = SampleLayout.from_lengths(batch.lengths, length, device)
        return _Microbatch(
            batch.tokens.to(device, non_blocking=True),
            batch.targets.to(device, non_blocking=True),
            on_device,
            TokenCounts.of(on_host, batch.targets),  # on the host: no wait for the device
            sum(self._flops_of(sample) for row in batch.lengths for sample in row),
        )

    def _agree(
        self, microbatches: list[_Microbatch], stop: bool
    ) -> tuple[TokenCounts, float, bool]:
        """Global counts and operations, and whether any rank wants to stop.

        One small all-reduce on the host; fp64 holds the counts exactly.
        """
        mine = sum((micro.counts for micro in microbatches[1:]), microbatches[0].counts)
        flops = sum(micro.flops for micro in microbatches)
        numbers = torch.tensor([mine.lm, mine.mtp, mine.routed, flops, stop], dtype=torch.float64)
        lm, mtp, routed, flops, stops = sum_(numbers, self.grid.data).tolist()
        return TokenCounts(lm=int(lm), mtp=int(mtp), routed=int(routed)), flops, stops > 0
