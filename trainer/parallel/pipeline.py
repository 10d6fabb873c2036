"""Layers divided over pipeline ranks, run by the schedules of torch.distributed.pipelining.

Stages (pipeline_stage.py) send the residual streams to each other, [T, N, D]: T tokens of this
rank, N streams, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model import V4Model
from model.transformer import Microbatch
from trainer.parallel.grid import Axis
from trainer.parallel.pipeline_stage import CurrentStep, Stage, StepAccumulator
from trainer.parallel.stage_plan import StagePlan


class Pipeline:
    """Runs a rank's stages over the microbatches of a step."""

    def __init__(self, model: V4Model, plan: StagePlan, axis: Axis) -> None:
        self.current = CurrentStep()
        self.plan, self.axis = plan, axis
        stage_ids = plan.stages_of(axis.rank) if axis.size > 1 else [0]
        self.stage_modules = [Stage(model, plan, stage_id, self.current) for stage_id in stage_ids]
        self._streams = (model.config.hc_mult, model.config.hidden_size)
        self._dtype = model.dtype
        self._device = next(model.parameters()).device
        self._stages: dict[int, list[Any]] = {}
        self._schedules: dict[tuple[int, int], Any] = {}
        if axis.size > 1:
            from trainer.parallel.pipeline_schedules import check_torch  # takes long to import

            check_torch()

    def stages(self, tokens: int) -> list[Any]:
        """Returns this rank's PipelineStages for microbatches with `tokens` local tokens."""
        if tokens not in self._stages:
            from trainer.parallel.pipeline_schedules import TransientBufferStage

            streams = self._streams_buffer(tokens, torch.device("meta")).requires_grad_()
            index = torch.empty(1, dtype=torch.int64, device="meta")
            loss = torch.empty(1, device="meta", requires_grad=True)
            self._stages[tokens] = [
                TransientBufferStage(
                    module,
                    stage_id,
                    len(self.plan.layer_counts),
                    self._device,
                    input_args=(index if stage_id == 0 else streams,),
                    output_args=(loss if self.plan.is_last(stage_id) else streams,),
                    group=self.axis.group,
                    waits=self.axis.traffic.waits,
                )
                for stage_id, module in zip(
                    self.plan.stages_of(self.axis.rank), self.stage_modules, strict=True
                )
            ]
        return self._stages[tokens]

    def schedule(self, microbatches: int, tokens: int) -> Any:
        """Returns torch's schedule of this many microbatches, on an axis of more than one rank."""
        key = (microbatches, tokens)
        if key not in self._schedules:
            from trainer.parallel.pipeline_schedules import make_schedule

            stages = self.stages(tokens)
            self._schedules[key] = make_schedule(self.plan.schedule, stages, microbatches)
        return self._schedules[key]

    def run(
        self,
        microbatches: Sequence[Microbatch],
        tokens: int,
        accumulator: StepAccumulator,
        backward: bool,
    ) -> None:
        """Forward of all microbatches, and backward into the parameters' gradients if asked.

        `tokens` is the number of local tokens of each.
        """
        self.current.microbatches, self.current.accumulator = microbatches, accumulator
        if self.axis.size == 1:
            self._run_single_rank(len(microbatches), backward)
        elif backward:
            self._run_schedule(len(microbatches), tokens)
        else:
            self._run_forward(len(microbatches), tokens)
        self._count_traffic(len(microbatches), tokens, backward)
        self.current.microbatches, self.current.accumulator = (), None

    def _streams_buffer(self, tokens: int, device: torch.device) -> Tensor:
        """Returns an empty tensor of the residual streams that stages send."""
        return torch.empty(tokens, *self._streams, dtype=self._dtype, device=device)

    def _run_single_rank(self, microbatches: int, backward: bool) -> None:
        nothing = torch.empty(0)
        for index in torch.arange(microbatches):
            loss = self.stage_modules[0](nothing, index)
            if backward:
                loss.backward()

    def _run_schedule(self, microbatches: int, tokens: int) -> None:
        schedule = self.schedule(microbatches, tokens)
        index = torch.arange(microbatches)
        arguments = (index,) if any(stage.is_first for stage in self.stages(tokens)) else ()
        with self.axis.waiting("send and receive"):  # but for the work of the stages
            schedule.step(*arguments, index=index, target=index, return_outputs=False)

    def _run_forward(self, microbatches: int, tokens: int) -> None:
        """Stage after stage, each over all microbatches.

        The schedules cannot skip backward where a rank has two stages.
        """
        rank_of = {n: r for r in range(self.axis.size) for n in self.plan.stages_of(r)}
        # Outputs of this rank's previous stage, when it feeds the next one on this rank.
        local: list[Tensor] = []
        works: list[Any] = []
        stage_ids = self.plan.stages_of(self.axis.rank)
        for stage_id, module in zip(stage_ids, self.stage_modules, strict=True):
            source, target = rank_of.get(stage_id - 1), rank_of.get(stage_id + 1)
            out = []
            for index in torch.arange(microbatches):
                if source is None or source == self.axis.rank:
                    streams = local[index] if local else torch.empty(0)
                else:
                    streams = self._streams_buffer(tokens, self._device)
                    with self.axis.waiting("receive"):
                        dist.recv(streams, group=self.axis.group, group_src=source)
                out.append(module(streams, index))
                if target is not None and target != self.axis.rank:
                    works.append(dist.isend(out[-1], group=self.axis.group, group_dst=target))
            local = out if target == self.axis.rank else []
        with self.axis.waiting("send"):
            for work in works:
                work.wait()

    def _count_traffic(self, microbatches: int, tokens: int, backward: bool) -> None:
        """Counts the activations sent forward and the activation gradients sent backward."""
        if self.axis.size == 1:
            return
        stage_ids = self.plan.stages_of(self.axis.rank)
        following = [n + 1 for n in stage_ids if not self.plan.is_last(n)]
        preceding = [n - 1 for n in stage_ids if n > 0 and backward]
        receivers = [n for n in following + preceding if n not in stage_ids]
        size = self._streams_buffer(tokens, torch.device("meta")).nbytes
        self.axis.traffic.add("pipeline", "send", len(receivers) * microbatches * size)
