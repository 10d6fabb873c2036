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
        numbers = plan.stages_of(axis.rank) if axis.size > 1 else [0]
        self.parts = [Stage(model, plan, number, self.current) for number in numbers]
        self._streams = (model.config.hc_mult, model.config.hidden_size)
        self._device = next(model.parameters()).device
        self._stages: dict[int, list[Any]] = {}
        self._schedules: dict[tuple[int, int], Any] = {}
        if axis.size > 1:
            from trainer.parallel.pipeline_schedules import check_torch  # takes long to import

            check_torch()
            weights = model.named_parameters()
            self._dtype = next(p.dtype for name, p in weights if name.endswith("wq_a.weight"))

    def stages(self, tokens: int) -> list[Any]:
        """torch's stages of this rank, for microbatches of which it holds this many tokens."""
        if tokens not in self._stages:
            from trainer.parallel.pipeline_schedules import TransientBufferStage

            streams = self._message(tokens, torch.device("meta")).requires_grad_()
            index = torch.empty(1, dtype=torch.int64, device="meta")
            loss = torch.empty(1, device="meta", requires_grad=True)
            self._stages[tokens] = [
                TransientBufferStage(
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

        This rank holds `tokens` tokens of each.
        """
        self.current.microbatches, self.current.accumulator = microbatches, accumulator
        if self.axis.size == 1:
            self._run_alone(len(microbatches), backward)
        elif backward:
            self._run_schedule(len(microbatches), tokens)
        else:
            self._run_forward(len(microbatches), tokens)
        self._count(len(microbatches), tokens, backward)
        self.current.microbatches, self.current.accumulator = (), None

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
        """Stage after stage, each over all microbatches.

        The schedules cannot skip backward where a rank has two stages.
        """
        rank_of = {n: r for r in range(self.axis.size) for n in self.plan.stages_of(r)}
        local: list[Tensor] = []  # what this rank's stage before sent to this rank
        works: list[Any] = []
        for number, part in zip(self.plan.stages_of(self.axis.rank), self.parts, strict=True):
            source, target = rank_of.get(number - 1), rank_of.get(number + 1)
            out = []
            for index in torch.arange(microbatches):
                if source is None or source == self.axis.rank:
                    streams = local[index] if local else torch.empty(0)
                else:
                    streams = self._message(tokens, self._device)
                    dist.recv(streams, group=self.axis.group, group_src=source)
                out.append(part(streams, index))
                if target is not None and target != self.axis.rank:
                    works.append(dist.isend(out[-1], group=self.axis.group, group_dst=target))
            local = out if target == self.axis.rank else []
        for work in works:
            work.wait()

    def _count(self, microbatches: int, tokens: int, backward: bool) -> None:
        """Counts the streams that this rank sends on, and their gradients that it sends back."""
        if self.axis.size == 1:
            return
        numbers = self.plan.stages_of(self.axis.rank)
        following = [n + 1 for n in numbers if not self.plan.is_last(n)]
        preceding = [n - 1 for n in numbers if n > 0 and backward]
        receivers = [n for n in following + preceding if n not in numbers]
        message = self._message(tokens, torch.device("meta")).nbytes
        self.axis.traffic.add("pipeline", "send", len(receivers) * microbatches * message)
