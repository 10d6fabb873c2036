"""The model as DeepSpeed trains it: one module that maps a microbatch's number to its loss.

Letters: T tokens, N streams, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from model import V4Model
from trainer.parallel.pipeline_stage import CurrentStep, Stage
from trainer.parallel.stage_plan import StagePlan


class _ModelWithStage(nn.Module):
    """A model, and the stage that runs all of it."""

    def __init__(self, model: V4Model, plan: StagePlan, current: CurrentStep) -> None:
        super().__init__()
        self.model = model
        self._stage = [Stage(model, plan, 0, current)]  # not a submodule: it has the same ones

    def forward(self, streams: Tensor, index: Tensor) -> Tensor:
        """Runs the stage: streams and the number of a microbatch to its loss [1]."""
        return self._stage[0](streams, index)


class DeepSpeedStage(nn.Module):
    """The model as one stage, which computes in fp32 what V4 does.

    In bf16 DeepSpeed holds every parameter in bf16, with an fp32 master. The computation uses fp32
    copies of norms, the streams' coefficients, sinks and gate biases.

    Rows can leave parameters without a gradient: a compressor, where no sample has a whole window.
    DeepSpeed reduces gradients in buckets, filled in the order in which backward makes them. With
    `fills_gradients`, each block's parameters get theirs together, when its backward ends, with
    zeros where there is none, so that all ranks reduce the same buckets.
    """

    def __init__(
        self, model: V4Model, plan: StagePlan, current: CurrentStep, fills_gradients: bool
    ) -> None:
        super().__init__()
        self.inner = _ModelWithStage(model, plan, current)
        if fills_gradients:
            for block in (*model.layers, *model.mtp):
                block.register_forward_pre_hook(_fill_gradients)
        is_low = any(parameter.dtype != torch.float32 for parameter in model.parameters())
        named = self.inner.named_parameters()
        self.upcast = {n for n, p in named if is_low and p.dtype == torch.float32}

    def forward(self, streams: Tensor, index: Tensor) -> Tensor:
        """Runs the stage, with fp32 copies of the parameters in `upcast`."""
        if not self.upcast:
            return self.inner(streams, index)
        named = self.inner.named_parameters()
        copies = {name: p.float() for name, p in named if name in self.upcast}
        return functional_call(self.inner, copies, (streams, index))


def _fill_gradients(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Makes backward through the block's streams end with gradients of all its parameters."""
    if not torch.is_grad_enabled():
        return None
    streams_TND, *others = inputs
    return _ZeroGradients.apply(streams_TND, *block.parameters()), *others


class _ZeroGradients(torch.autograd.Function):
    """Identity on streams; backward adds zeros to the gradients of some parameters."""

    @staticmethod
    def forward(ctx: Any, streams_TND: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return streams_TND.view_as(streams_TND)

    @staticmethod
    def backward(ctx: Any, grad_TND: Tensor) -> tuple[Tensor, ...]:
        zeros = (
            torch.zeros((), dtype=dtype, device=device).expand(shape)
            for shape, dtype, device in ctx.like
        )
        return grad_TND, *zeros
