"""One stage of a pipeline as a module, and what it records while a step runs.

A stage is a contiguous range of layers; the first also embeds, the last also has the streams' head,
the final norm, the output head and the MTP block with the embedding (a copy, unless the first
stage is on the same rank). Every rank reads the
token ids of its rows itself, so nothing is sent for hash layers, targets and layouts, and balance
losses are differentiated on the stage that computes them.

Letters: T tokens of this rank, A experts of a token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model import V4Model
from model.layout import SampleLayout
from model.moe import MoEStats
from model.router import expert_loads, top1_weight_shares
from model.transformer import Microbatch
from trainer.parallel.stage_plan import StagePlan

Reader = Callable[[Tensor, Microbatch, int], None]
"""Takes a microbatch's streams [T, N, D] after the last layer, the microbatch, and its index."""


@dataclass
class StepAccumulator:
    """Device accumulators of a step, to which every local stage adds.

    Attributes:
        losses: fp64 [4]: lm, mtp (unweighted), balance and the indexers'.
        load: fp32 [layers (+ MTP), E]: tokens of each expert.
        top1_weight_share: fp32 [layers (+ MTP)]: sum over tokens of the share that the largest
            weight has of a token's weights.
        experts: if a list, the step is routing-only: it records, per microbatch and layer, the
            experts [T, A] that learned routers select, in the smallest integer dtype; losses and
            loads are not updated.
        reader: if given, it is called in the last stage in place of the heads; losses and loads are
            not updated.
    """

    losses: Tensor
    load: Tensor
    top1_weight_share: Tensor
    experts: list[dict[int, Tensor]] | None = None
    reader: Reader | None = None

    @classmethod
    def zeros(cls, model: V4Model, device: torch.device) -> StepAccumulator:
        """Returns the accumulators before the first microbatch."""
        num_layers = model.config.num_hidden_layers + model.config.num_nextn_predict_layers
        return cls(
            losses=torch.zeros(4, dtype=torch.float64, device=device),
            load=torch.zeros(num_layers, model.config.n_routed_experts, device=device),
            top1_weight_share=torch.zeros(num_layers, device=device),
        )


@dataclass
class CurrentStep:
    """The step's microbatches, which every stage looks up by index, and its accumulator."""

    microbatches: Sequence[Microbatch] = ()
    accumulator: StepAccumulator | None = None


class Stage(nn.Module):
    """One stage: a range of a model's blocks, and what only the first and the last stage have.

    A schedule passes the streams and a microbatch's index; everything else comes from `step`.
    """

    def __init__(self, model: V4Model, plan: StagePlan, stage_id: int, step: CurrentStep) -> None:
        super().__init__()
        self.first, self.last = stage_id == 0, plan.is_last(stage_id)
        self.layer_indices = list(plan.layers_of(stage_id))
        self.blocks = nn.ModuleList(model.layers[index] for index in self.layer_indices)
        # The parameters of this stage, registered so that zero-bubble schedules find them.
        if self.first or (self.last and len(model.mtp)):
            self.embed = model.embed
        if self.last:
            self.hc_head, self.norm, self.head = model.hc_head, model.norm, model.head
            self.mtp = model.mtp
        self._model = [model]  # in a list, so that it is not registered as a submodule
        self.step = step

    def forward(self, streams: Tensor, index: Tensor) -> Tensor:
        """Maps streams to streams; the last stage returns the loss, [1].

        The first stage embeds; its `streams` is a placeholder.
        """
        model, micro = self._model[0], self.step.microbatches[int(index)]
        accumulator = self.step.accumulator
        assert accumulator is not None
        received = streams
        only_indexers_learn = micro.attention == "warmup" and torch.is_grad_enabled()
        if self.first:
            streams = model.embed_streams(micro)
        elif only_indexers_learn:
            streams = streams.detach()
        streams, stats = model.run_blocks(streams, micro, self.blocks)
        layer_indices = list(self.layer_indices)
        if accumulator.experts is not None:
            accumulator.experts[int(index)].update(self._selected_experts(streams, micro, stats))
            return streams
        if accumulator.reader is not None:
            if self.last:
                accumulator.reader(streams, micro, int(index))
            return streams
        lm = mtp = None
        if self.last:
            lm, mtp, mtp_stats = model.losses(streams, micro)
            stats = stats + mtp_stats
            layer_indices += [model.config.num_hidden_layers] * len(mtp_stats)
        balance = model.weighted_balance(stats)
        indexer = model.indexer_loss(stats)
        parts = (lm, mtp, balance, indexer)
        _accumulate(accumulator, parts, layer_indices, stats, micro.positions.layout)
        layer_losses = [loss for loss in (balance, indexer) if loss is not None]
        out = streams
        if lm is not None and mtp is not None:
            out = sum(layer_losses, lm + micro.mtp_loss_weight * mtp).view(1)
        if only_indexers_learn:
            return _without_block_gradients(out, received, indexer)
        if self.last or not layer_losses:
            return out
        return _AddLoss.apply(out, sum(layer_losses[1:], layer_losses[0]))

    def _selected_experts(
        self, streams: Tensor, micro: Microbatch, stats: Sequence[MoEStats]
    ) -> dict[int, Tensor]:
        """Returns by layer what this stage's learned routers select for a microbatch."""
        config = self._model[0].config
        experts = {
            index: block.expert_indices_TA
            for index, block in zip(self.layer_indices, stats, strict=True)
        }
        if self.last:
            of_mtp = self._model[0].select_mtp_experts(streams, micro)
            experts |= dict(enumerate(of_mtp, config.num_hidden_layers))
        dtype = index_dtype(config.n_routed_experts)
        return {
            index: expert_TA.to(dtype)
            for index, expert_TA in experts.items()
            if index >= config.num_hash_layers
        }


@torch.no_grad()
def _accumulate(
    accumulator: StepAccumulator,
    losses: Sequence[Tensor | None],
    layer_indices: Sequence[int],
    stats: Sequence[MoEStats],
    layout: SampleLayout,
) -> None:
    """Adds a microbatch's losses and routing, of all layers at once: few launches."""
    for index, loss in enumerate(losses):
        if loss is not None:
            accumulator.losses[index].add_(loss)
    if stats:
        load, top1 = accumulator.load, accumulator.top1_weight_share
        loads_LE = expert_loads([s.expert_indices_TA for s in stats], layout, load.shape[1])
        shares_L = top1_weight_shares([s.weights_TA for s in stats], layout)
        totals = [rows[index] for rows in (load, top1) for index in layer_indices]
        torch._foreach_add_(totals, [*loads_LE, *shares_L])


def index_dtype(num_experts: int) -> torch.dtype:
    """Returns the smallest integer dtype supported by safetensors that can hold an expert index."""
    for dtype in (torch.uint8, torch.int16):
        if num_experts - 1 <= torch.iinfo(dtype).max:
            return dtype
    return torch.int32


class _AddLoss(torch.autograd.Function):
    """Identity on streams; backward gives `loss` gradient 1, as if added to the total loss."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss
        # Returned in place: torch's pipeline detaches stage outputs, which fails on views.
        ctx.mark_dirty(streams)
        return streams

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.like)


def _without_block_gradients(out: Tensor, received: Tensor, loss: Tensor | None) -> Tensor:
    """Returns a stage's output where only indexers learn: no gradient goes through its blocks.

    The pipeline schedule needs a gradient for the stage's input, here zeros, and a differentiable
    output, even if the stage has no indexer.
    """
    anchor = received if received.requires_grad else out.new_zeros(1).requires_grad_()
    return _LossGradientOnly.apply(out.detach().clone(), anchor, loss)


class _LossGradientOnly(torch.autograd.Function):
    """Identity on `out`; backward gives `loss` gradient 1 and `anchor` zeros, and `out` none."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor, loss: Tensor | None) -> Tensor:
        ctx.anchor, ctx.like = torch.zeros_like(anchor), loss
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.anchor, None if ctx.like is None else torch.ones_like(ctx.like)
