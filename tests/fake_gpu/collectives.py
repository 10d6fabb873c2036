"""Collectives over torch's fake process group, compared with what NCCL takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.fake_gpu.device import FakeGpu
from tests.fake_gpu.report import place

NCCL_DTYPES = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
}
WATCHED = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "batch_isend_irecv",
    "broadcast",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "send",
)


def _watched(gpu: FakeGpu, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        tensors += [x.tensor for x in leaves if isinstance(x, dist.P2POp)]
        for tensor in tensors:
            dtype = str(tensor.dtype).removeprefix("torch.")
            gpu.report.collectives[name, tensor.device.type, dtype] += 1
            if not tensor.is_contiguous():
                gpu.report.refused[f"{name} of a tensor that is not contiguous, {place()}"] += 1
            if tensor.device.type == "cuda" and tensor.dtype not in NCCL_DTYPES:
                gpu.report.refused[f"{name} of {dtype}, {place()}"] += 1
        if name == "all_to_all_single" and len(args) >= 4:
            for tensor, sizes in ((args[0], args[2]), (args[1], args[3])):
                if sum(sizes) != len(tensor):
                    gpu.report.refused[f"{name}: {sizes} of {len(tensor)} rows, {place()}"] += 1
        return plain(*args, **kwargs)

    return call


@contextmanager
def watch_collectives(gpu: FakeGpu) -> Iterator[None]:
    """Compares every collective inside the block with what NCCL takes."""
    from trainer.parallel import collectives

    with ExitStack() as stack:
        for name in WATCHED:
            if plain := getattr(dist, name, None):
                call = _watched(gpu, name, plain)
                stack.enter_context(patch.object(dist, name, call))
                for alias in ("_all_gather", "_reduce_scatter"):  # taken when it was imported
                    if getattr(collectives, alias) is plain:
                        stack.enter_context(patch.object(collectives, alias, call))
        yield


def _object_collectives() -> dict[str, Callable[..., None]]:
    """Collectives of objects, as if every other rank sent what this rank sends."""

    def size(group: Any) -> int:
        return dist.get_world_size(group)

    def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
        object_list[:] = [obj] * size(group)

    def gather_object(
        obj: Any, object_gather_list: list[Any] | None = None, *_: Any, group: Any = None, **__: Any
    ) -> None:
        if object_gather_list is not None:
            object_gather_list[:] = [obj] * size(group)

    def scatter_object_list(
        scatter_object_output_list: list[Any],
        scatter_object_input_list: list[Any] | None = None,
        *_: Any,
        **__: Any,
    ) -> None:
        assert scatter_object_input_list, "only the rank that scatters can be faked"
        scatter_object_output_list[0] = scatter_object_input_list[0]

    def broadcast_object_list(*_: Any, **__: Any) -> None:
        """Leaves the objects as they are."""

    return {call.__name__: call for call in list(locals().values()) if call is not size}


@contextmanager
def fake_ranks(world: int, rank: int) -> Iterator[None]:
    """This process is one rank of a group whose other ranks do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if world == 1:
        yield
        return
    # As in training, objects travel between hosts and tensors between devices.
    backends = "cpu:fake,cuda:fake"
    dist.init_process_group(backends, store=FakeStore(), rank=rank, world_size=world)
    try:
        with patch.multiple(dist, **_object_collectives()):
            yield
    finally:
        dist.destroy_process_group()
