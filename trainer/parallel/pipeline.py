"""Layers divided over pipeline ranks, run by the schedules of torch.distributed.pipelining.

A stage is a run of layers; the first also embeds, the last also has the streams' head, the final
norm, the output head and the MTP block with a copy of the embedding. Stages send the residual
streams to each other. Every rank reads the token ids of its rows itself, so hash layers, targets
and layouts need no message, and balance losses are differentiated on the stage they arise on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from model import V4Model
from model.moe import MoEStats
from model.transformer import Microbatch
from trainer.parallel.grid import Axis
from trainer.parallel.stage_plan import StagePlan

_SINGLE = Schedule1F1B
_MULTI = {
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble_v": ScheduleZBVZeroBubble,
    "dual_pipe_v": ScheduleDualPipeV,
}


@dataclass
class Tally:
    """What stages note down while a step runs: sums over microbatches, on the device."""

    losses: Tensor
    """fp64 [4]: lm, mtp (unweighted), balance and the indexers'."""
    load: Tensor
    """fp32 [layers (+ MTP), E + 1]: tokens of each expert, then the sum of first_share."""
    chosen: list[dict[int, Tensor]] | None = None
    """Where there is a list: only the experts that learned routers choose are wanted, by microbatch
    and layer [T, A], in the smallest integers that hold them. Losses and loads stay as they are."""

    @classmethod
    def zeros(cls, model: V4Model, device: torch.device) -> Tally:
        """Nothing noted yet."""
        rows = model.config.num_hidden_layers + model.config.num_nextn_predict_layers
        load = torch.zeros(rows, model.config.n_routed_experts + 1, device=device)
        return cls(torch.zeros(4, dtype=torch.float64, device=device), load)


@dataclass
class Feed:
    """The step's microbatches, which every stage looks up by number, and the step's tally."""

    microbatches: Sequence[Microbatch] = ()
    tally: Tally | None = None


class Stage(nn.Module):
    """One stage: some blocks of a model, and what the first and the last stage have besides."""

    def __init__(self, model: V4Model, plan: StagePlan, number: int, feed: Feed) -> None:
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
        self._model = [model]  # not a submodule: it may have other stages' layers, too
        self.feed = feed

    def forward(self, streams: Tensor, index: Tensor) -> Tensor:
        """Streams to streams, or in the last stage to the loss [1]; the first embeds."""
        model, micro = self._model[0], self.feed.microbatches[int(index)]
        given = streams
        frozen = micro.attention == "warmup" and torch.is_grad_enabled()
        if self.first:
            streams = model.embed_streams(micro)
        elif frozen:
            streams = streams.detach()
        streams, stats = model.run_blocks(streams, micro, self.blocks)
        rows = list(self.rows)
        if self.feed.tally is not None and self.feed.tally.chosen is not None:
            self._note_chosen(self.feed.tally.chosen[int(index)], streams, micro, stats)
            return streams
        lm = mtp = None
        if self.last:
            lm, mtp, seen = model.predict(streams, micro)
            stats, rows = stats + seen, rows + [model.config.num_hidden_layers] * len(seen)
        balance = model.weighted_balance(stats)
        indexer = model.indexer_loss(stats)
        self._note((lm, mtp, balance, indexer), rows, [_load(seen) for seen in stats])
        losses = [loss for loss in (balance, indexer) if loss is not None]
        out = streams
        if lm is not None and mtp is not None:
            out = sum(losses, lm + micro.mtp_loss_weight * mtp).view(1)
        if frozen:
            return _hold_still(out, given, indexer)
        return out if self.last or not losses else _WithLoss.apply(out, sum(losses[1:], losses[0]))

    def _note_chosen(
        self,
        chosen: dict[int, Tensor],
        streams: Tensor,
        micro: Microbatch,
        stats: Sequence[MoEStats],
    ) -> None:
        config = self._model[0].config
        found = {row: seen.chosen_TA for row, seen in zip(self.rows, stats, strict=True)}
        if self.last:
            following = self._model[0].choose_next(streams, micro)
            found |= dict(enumerate(following, config.num_hidden_layers))
        for row, chosen_TA in found.items():
            if row >= config.num_hash_layers:
                chosen[row] = chosen_TA.to(index_dtype(config.n_routed_experts))

    @torch.no_grad()
    def _note(
        self,
        losses: tuple[Tensor | None, ...],
        rows: list[int],
        loads: list[Tensor],
    ) -> None:
        tally = self.feed.tally
        assert tally is not None
        for place, loss in enumerate(losses):
            if loss is not None:
                tally.losses[place] += loss.double()
        for row, load_E in zip(rows, loads, strict=True):
            tally.load[row] += load_E


def index_dtype(experts: int) -> torch.dtype:
    """The smallest integer type that holds an expert's number, of those that safetensors holds."""
    for dtype in (torch.uint8, torch.int16):
        if experts - 1 <= torch.iinfo(dtype).max:
            return dtype
    return torch.int32


class _WithLoss(torch.autograd.Function):
    """Streams as they are; in backward, `loss` gets the gradient 1 as if it were in the sum."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss
        ctx.mark_dirty(streams)  # in place, as a view could not be detached after backward
        return streams

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.like)


def _hold_still(out: Tensor, given: Tensor, loss: Tensor | None) -> Tensor:
    """A stage's result where nothing but indexers learns: no gradient goes through its blocks.

    A schedule wants a gradient for what the stage was given, which is zeros, and a result to
    differentiate, even where the stage has no indexer.
    """
    anchor = given if given.requires_grad else out.new_zeros(1).requires_grad_()
    return _Still.apply(out.detach().clone(), anchor, loss)


class _Still(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor, loss: Tensor | None) -> Tensor:
        ctx.anchor, ctx.like = torch.zeros_like(anchor), loss
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.anchor, None if ctx.like is None else torch.ones_like(ctx.like)


class _Received(PipelineStage):
    """A stage whose buffers for what it receives live from the receiving to their use.

    torch makes both buffers of all microbatches before the first and keeps them for ever, which is
    more than there is memory where a step has hundreds of microbatches.
    """

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        with self._without_memory():
            super()._setup_forward_recv_info(num_microbatches, has_backward)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        with self._without_memory():
            super()._setup_backward_recv_info(num_microbatches)

    @contextmanager
    def _without_memory(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Receives of a microbatch's input, into new buffers."""
        self._make(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Receives of the gradient of a microbatch's output, into new buffers."""
        if self.has_backward:
            self._make(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Forward of a microbatch; autograd holds its input from here on."""
        out = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self._drop(self.args_recv_info[fwd_chunk_id])
        return out

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """Backward of a microbatch."""
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        self._drop(self.grad_recv_info[bwd_chunk_id])

    def _make(self, infos: Sequence[Any]) -> None:
        for info in infos:
            if not info.is_root_arg:
                info.buffer = info.tensor_meta.to_tensor(self.device).requires_grad_(False)

    def _drop(self, infos: Sequence[Any]) -> None:
        for info in infos:
            info.buffer = None


def _load(seen: MoEStats) -> Tensor:
    return torch.cat([seen.load_E, seen.first_share[None]])


class Pipeline:
    """Runs a rank's stages over the microbatches of a step."""

    def __init__(self, model: V4Model, plan: StagePlan, axis: Axis) -> None:
        self.feed = Feed()
        self.plan, self.axis = plan, axis
        numbers = plan.stages_of(axis.rank) if axis.size > 1 else [0]
        self.parts = [Stage(model, plan, number, self.feed) for number in numbers]
        self._streams = (model.config.hc_mult, model.config.hidden_size)
        self._device = next(model.parameters()).device
        self._stages: dict[int, list[Any]] = {}
        self._schedules: dict[tuple[int, int], Any] = {}
        if axis.size == 1:
            return
        if not hasattr(PipelineStage, "_setup_forward_recv_info"):
            raise RuntimeError(f"pipelines need torch 2.13 or newer; this is {torch.__version__}")
        weights = model.named_parameters()
        self._dtype = next(p.dtype for name, p in weights if name.endswith("wq_a.weight"))

    def stages(self, tokens: int) -> list[Any]:
        """torch's stages of this rank for microbatches of this many own tokens."""
        if tokens not in self._stages:
            streams = self._message(tokens, torch.device("meta")).requires_grad_()
            index = torch.empty(1, dtype=torch.int64, device="meta")
            loss = torch.empty(1, device="meta", requires_grad=True)
            self._stages[tokens] = [
                _Received(
                    part,
                    number,
                    len(self.plan.layers),
                    self._device,
                    input_args=(index if number == 0 else streams,),
                    output_args=(loss if self.plan.is_last(number) else streams,),
                    group=self.axis.group,
                )
                for number, part in zip(
                    self.plan.stages_of(self.axis.rank), self.parts, strict=True
                )
            ]
        return self._stages[tokens]

    def schedule(self, microbatches: int, tokens: int) -> Any:
        """torch's schedule of this many microbatches, where there is more than one rank."""
        key = (microbatches, tokens)
        if key not in self._schedules:
            stages = self.stages(tokens)
            settings: Any = {"loss_fn": lambda loss, _: loss.sum(), "scale_grads": False}
            if self.plan.schedule == "1f1b":
                made: Any = _SINGLE(stages[0], microbatches, **settings)
            else:
                made = _MULTI[self.plan.schedule](stages, microbatches, **settings)
            self._schedules[key] = made
        return self._schedules[key]

    def run(
        self, microbatches: Sequence[Microbatch], tokens: int, tally: Tally, backward: bool
    ) -> None:
        """Forward of all microbatches, and backward into the parameters' gradients if asked.

        Each has `tokens` own tokens.
        """
        self.feed.microbatches, self.feed.tally = microbatches, tally
        if self.axis.size == 1:
            self._run_alone(len(microbatches), backward)
        elif backward:
            self._run_schedule(len(microbatches), tokens)
        else:
            self._run_forward(len(microbatches), tokens)
        self._count(len(microbatches), tokens, backward)
        self.feed.microbatches, self.feed.tally = (), None

    def _message(self, tokens: int, device: torch.device) -> Tensor:
        """Residual streams as stages send them."""
        return torch.empty(tokens, *self._streams, dtype=self._dtype, device=device)

    def _run_alone(self, microbatches: int, backward: bool) -> None:
        nothing = torch.empty(0)
        for index in torch.arange(microbatches):
            loss = self.parts[0](nothing, index)
            if backward:
                loss.backward()

    def _run_schedule(self, microbatches: int, tokens: int) -> None:
        schedule = self.schedule(microbatches, tokens)
        index = torch.arange(microbatches)
        arguments = (index,) if any(stage.is_first for stage in self.stages(tokens)) else ()
        schedule.step(*arguments, index=index, target=index, return_outputs=False)

    def _run_forward(self, microbatches: int, tokens: int) -> None:
        """Stage after stage, each over all microbatches: the schedules cannot leave backward out
        where a rank has two stages."""
        rank_of = {n: r for r in range(self.axis.size) for n in self.plan.stages_of(r)}
        here: list[Tensor] = []
        works: list[Any] = []
        for number, part in zip(self.plan.stages_of(self.axis.rank), self.parts, strict=True):
            source, target = rank_of.get(number - 1), rank_of.get(number + 1)
            out = []
            for index in torch.arange(microbatches):
                if source is None or source == self.axis.rank:
                    streams = here[index] if here else torch.empty(0)
                else:
                    streams = self._message(tokens, self._device)
                    dist.recv(streams, group=self.axis.group, group_src=source)
                out.append(part(streams, index))
                if target is not None and target != self.axis.rank:
                    works.append(dist.isend(out[-1], group=self.axis.group, group_dst=target))
            here = out if target == self.axis.rank else []
        for work in works:
            work.wait()

    def _count(self, microbatches: int, tokens: int, backward: bool) -> None:
        """Streams that this rank sends on, and their gradients that it sends back."""
        if self.axis.size == 1:
            return
        numbers = self.plan.stages_of(self.axis.rank)
        ahead = [n + 1 for n in numbers if not self.plan.is_last(n)]
        behind = [n - 1 for n in numbers if n > 0 and backward]
        sent = [n for n in ahead + behind if n not in numbers]
        message = self._message(tokens, torch.device("meta")).nbytes
        self.axis.traffic.add("pipeline", "send", len(sent) * microbatches * message)
