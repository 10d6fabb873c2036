"""torch.distributed.pipelining: the objects of a rank's stages, and the schedules over them.

Imported only where there are several pipeline ranks, since torch's module takes long to import.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from trainer.parallel.waits import Waits

_MULTI_STAGE_SCHEDULES = {
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble_v": ScheduleZBVZeroBubble,
    "dual_pipe_v": ScheduleDualPipeV,
}


def check_torch() -> None:
    """Raises RuntimeError where this torch has no pipelines that can be used here."""
    if not hasattr(PipelineStage, "_setup_forward_recv_info"):
        raise RuntimeError(f"pipelines need torch 2.13 or newer; this is {torch.__version__}")


def make_schedule(name: str, stages: Sequence[Any], microbatches: int) -> Any:
    """Returns torch's schedule of this many microbatches over a rank's stages."""
    settings: Any = {"loss_fn": lambda loss, _: loss.sum(), "scale_grads": False}
    if name == "1f1b":
        return Schedule1F1B(stages[0], microbatches, **settings)
    return _MULTI_STAGE_SCHEDULES[name](list(stages), microbatches, **settings)


class TransientBufferStage(PipelineStage):
    """A stage whose receive buffers are allocated at the receive and freed after use.

    torch allocates receive buffers for all microbatches up front and never frees them, which does
    not fit in memory where a step has hundreds of microbatches.

    `waits` takes a schedule for a wait of which only the stage's forward and backward are work.
    """

    def __init__(self, *args: Any, waits: Waits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.waits = waits

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        with self._on_meta_device():
            super()._setup_forward_recv_info(num_microbatches, has_backward)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        with self._on_meta_device():
            super()._setup_backward_recv_info(num_microbatches)

    @contextmanager
    def _on_meta_device(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Returns the receives of a microbatch's input, into new buffers."""
        self._allocate(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Returns the receives of the gradient of a microbatch's output, into new buffers."""
        if self.has_backward:
            self._allocate(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Runs forward of a microbatch; autograd keeps its input from here on."""
        with self.waits.working():
            out = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self._free(self.args_recv_info[fwd_chunk_id])
        return out

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """Runs backward of a microbatch."""
        with self.waits.working():
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        self._free(self.grad_recv_info[bwd_chunk_id])

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """Runs the gradients of the weights, where a schedule computes them separately."""
        with self.waits.working():
            super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)

    def _allocate(self, infos: Sequence[Any]) -> None:
        for info in infos:
            if not info.is_root_arg:
                info.buffer = info.tensor_meta.to_tensor(self.device).requires_grad_(False)

    def _free(self, infos: Sequence[Any]) -> None:
        for info in infos:
            info.buffer = None
