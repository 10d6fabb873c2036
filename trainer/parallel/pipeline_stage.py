"""One stage of a pipeline as a module, and what it records while a step runs.

A stage is a run of layers; the first also embeds, the last also has the streams' head, the final
norm, the output head and the MTP block with a copy of the embedding. Every rank reads the token ids
of its rows itself, so hash layers, targets and layouts need no message, and balance losses are
differentiated on the stage where they arise.

Letters: T tokens of this rank, A experts of a token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model import V4Model
from model.moe import MoEStats
from model.transformer import Microbatch
from trainer.parallel.stage_plan import StagePlan


@dataclass
class StepAccumulator:
    """Sums over a step's microbatches, on the device, to which every stage adds.

    Attributes:
        losses: fp64 [4]: lm, mtp (unweighted), balance and the indexers'.
        load: fp32 [layers (+ MTP), E + 1]: tokens of each expert, then the top1_weight_share.
        experts: where there is a list, a step only collects the experts that learned routers
            choose, by microbatch and layer [T, A], in the smallest integers that hold them; losses
            and loads stay as they are.
    """

    losses: Tensor
    load: Tensor
    experts: list[dict[int, Tensor]] | None = None

    @classmethod
    def zeros(cls, model: V4Model, device: torch.device) -> StepAccumulator:
        """Sums before the first microbatch."""
        rows = model.config.num_hidden_layers + model.config.num_nextn_predict_layers
        load = torch.zeros(rows, model.config.n_routed_experts + 1, device=device)
        return cls(torch.zeros(4, dtype=torch.float64, device=device), load)


@dataclass
class CurrentStep:
    """The step's microbatches, which every stage looks up by number, and its accumulator."""

    microbatches: Sequence[Microbatch] = ()
    accumulator: StepAccumulator | None = None


class Stage(nn.Module):
    """One stage: some blocks of a model, and what only the first and the last stage have.

    A schedule passes the streams and a microbatch's number; all else comes from `step`.
    """

    def __init__(self, model: V4Model, plan: StagePlan, number: int, step: CurrentStep) -> None:
        super().__init__()
        self.first, self.last = number == 0, plan.is_last(number)
        self.rows = list(plan.layers_of(number))
        self.blocks = nn.ModuleList(model.layers[row] for row in self.rows)
        # The parameters of this stage, registered so that zero-bubble schedules find them.
        if self.first or (self.last and len(model.mtp)):
            self.embed = model.embed
        if self.last:
            self.hc_head, self.norm, self.head = model.hc_head, model.norm, model.head
            self.mtp = model.mtp
        self._model = [model]  # not a submodule: it may have other stages' layers as well
        self.step = step

    def forward(self, streams: Tensor, index: Tensor) -> Tensor:
        """Streams to streams, or in the last stage to the loss [1]; the first embeds."""
        model, micro = self._model[0], self.step.microbatches[int(index)]
        accumulator = self.step.accumulator
        assert accumulator is not None
        received = streams
        frozen = micro.attention == "warmup" and torch.is_grad_enabled()
        if self.first:
            streams = model.embed_streams(micro)
        elif frozen:
            streams = streams.detach()
        streams, stats = model.run_blocks(streams, micro, self.blocks)
        rows = list(self.rows)
        if accumulator.experts is not None:
            accumulator.experts[int(index)].update(self._selected_experts(streams, micro, stats))
            return streams
        lm = mtp = None
        if self.last:
            lm, mtp, mtp_stats = model.losses(streams, micro)
            stats = stats + mtp_stats
            rows += [model.config.num_hidden_layers] * len(mtp_stats)
        balance = model.weighted_balance(stats)
        indexer = model.indexer_loss(stats)
        _accumulate(accumulator, (lm, mtp, balance, indexer), rows, stats)
        layer_losses = [loss for loss in (balance, indexer) if loss is not None]
        out = streams
        if lm is not None and mtp is not None:
            out = sum(layer_losses, lm + micro.mtp_loss_weight * mtp).view(1)
        if frozen:
            return _without_block_gradients(out, received, indexer)
        if self.last or not layer_losses:
            return out
        return _AddLoss.apply(out, sum(layer_losses[1:], layer_losses[0]))

    def _selected_experts(
        self, streams: Tensor, micro: Microbatch, stats: Sequence[MoEStats]
    ) -> dict[int, Tensor]:
        """By layer, what this stage's learned routers choose for a microbatch."""
        config = self._model[0].config
        experts = {
            row: block.expert_indices_TA for row, block in zip(self.rows, stats, strict=True)
        }
        if self.last:
            of_mtp = self._model[0].select_mtp_experts(streams, micro)
            experts |= dict(enumerate(of_mtp, config.num_hidden_layers))
        dtype = index_dtype(config.n_routed_experts)
        return {
            row: c_TA.to(dtype) for row, c_TA in experts.items() if row >= config.num_hash_layers
        }


@torch.no_grad()
def _accumulate(
    accumulator: StepAccumulator,
    losses: Sequence[Tensor | None],
    rows: Sequence[int],
    stats: Sequence[MoEStats],
) -> None:
    for place, loss in enumerate(losses):
        if loss is not None:
            accumulator.losses[place] += loss.double()
    for row, block in zip(rows, stats, strict=True):
        accumulator.load[row] += torch.cat([block.load_E, block.top1_weight_share[None]])


def index_dtype(experts: int) -> torch.dtype:
    """The smallest integer type that holds an expert's number, of those that safetensors holds."""
    for dtype in (torch.uint8, torch.int16):
        if experts - 1 <= torch.iinfo(dtype).max:
            return dtype
    return torch.int32


class _AddLoss(torch.autograd.Function):
    """Streams as they are; in backward, `loss` gets the gradient 1 as if it were in the sum."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss
        ctx.mark_dirty(streams)  # in place, as a view could not be detached after backward
        return streams

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.like)


def _without_block_gradients(out: Tensor, received: Tensor, loss: Tensor | None) -> Tensor:
    """A stage's result where nothing but indexers learns: no gradient goes through its blocks.

    A schedule wants a gradient for what the stage received, which is zeros, and a result to
    differentiate, even where the stage has no indexer.
    """
    anchor = received if received.requires_grad else out.new_zeros(1).requires_grad_()
    return _GradientOfLossAlone.apply(out.detach().clone(), anchor, loss)


class _GradientOfLossAlone(torch.autograd.Function):
    """`out` as it is; in backward `loss` gets the gradient 1, and `anchor` zeros."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor, loss: Tensor | None) -> Tensor:
        ctx.anchor, ctx.like = torch.zeros_like(anchor), loss
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.anchor, None if ctx.like is None else torch.ones_like(ctx.like)
