"""The fake GPU: what is on the host runs, what is on "cuda" has shapes, dtypes and devices only.

Host tensors are real and tensors of device cuda are FakeTensors, so that the trainer's own code
runs whole: loader, counts, schedules. A number that is read from the device is 1.
There are no values, no races and no streams: an operation's order on streams is not checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.fake_gpu.report import Report, place

_SIZED_BY_VALUES = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::histc",
    "aten::equal",
    "aten::is_nonzero",
}
_WITHOUT_KERNEL = {
    "aten::detach",
    "aten::alias",
    "aten::_unsafe_view",
    "aten::_reshape_alias",
    "aten::lift_fresh",
    "aten::set_",
    "aten::resize_",
    "aten::sym_size",
    "aten::is_pinned",
    "aten::record_stream",
    "aten::_local_scalar_dense",
}
_FOREACH_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""Tensors that a multi-tensor launch takes, by the number of lists (MultiTensorApply.cuh)."""
_FOREACH_CHUNK, _FOREACH_BLOCKS = 65536, 320


class FakeGpu(TorchDispatchMode):
    """Runs operators on shapes and writes into `report` what a real GPU would not forgive."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.report = Report()
        self._pinned: dict[int, Tensor] = {}  # by address; alive, so that none is used again

    @contextmanager
    def reporting(self, report: Report) -> Iterator[Report]:
        """Writes into another report inside the block."""
        before, self.report = self.report, report
        try:
            yield report
        finally:
            self.report = before

    def pin(self, tensor: Tensor) -> Tensor:
        """A copy in page-locked memory."""
        copy = tensor.clone()
        self._pinned[copy.untyped_storage().data_ptr()] = copy
        return copy

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a host tensor is in page-locked memory."""
        is_fake = isinstance(tensor, FakeTensor)
        return not is_fake and tensor.untyped_storage().data_ptr() in self._pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        kwargs = dict(kwargs or {})
        name = func.name().split(".")[0] if hasattr(func, "name") else str(func)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = [x for x in tensors if x.device.type == "cuda"]
        on_host = [x for x in tensors if x.device.type == "cpu"]
        device = kwargs.get("device")
        to_gpu = device is not None and torch.device(device).type == "cuda"
        if not (on_gpu or to_gpu):
            pin = kwargs.pop("pin_memory", False)
            out = func(*args, **kwargs)
            return self.pin(out) if pin else out
        if name == "aten::_local_scalar_dense":
            self.report.waits[place()] += 1
            return (tensors[0].dtype.is_floating_point and 1.0) or 1
        if name == "aten::_to_copy" and device is not None and on_gpu != tensors * to_gpu:
            return self._copy_between(tensors[0], to_gpu, kwargs)
        if device is not None and not to_gpu and name.endswith("_like"):
            host = torch.ones(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
            return self.pin(host) if kwargs.get("pin_memory") else host
        if name == "aten::copy_" and on_gpu and on_host:
            return self._copy_into(args, kwargs)
        if [x for x in on_host if x.dim()] and name != "aten::index":
            self.report.mixed[f"{name} {place()}"] += 1
        self._check_sizes(name, args, kwargs)
        with self.fake:
            out = _largest(name, args)
            if out is None:
                out = func(*_without_masks(name, args), **kwargs)
        self._count(func, name, args, tensors, out)
        return out

    def _copy_between(self, source: Tensor, to_gpu: bool, kwargs: Any) -> Tensor:
        """A new tensor on the other device."""
        asynchronous = kwargs.get("non_blocking", False)
        self.report.operations["copy between devices"] += 1
        if not to_gpu:  # torch's `to` gives pageable memory, and then the host waits
            self.report.waits[place()] += 1
            return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if not (asynchronous and self.is_pinned(source)):
            self.report.blocking_copies[f"to the device, {place()}"] += 1
        dtype = kwargs.get("dtype") or source.dtype
        with self.fake:
            return torch.empty_strided(source.shape, source.stride(), dtype=dtype, device="cuda")

    def _copy_into(self, args: Any, kwargs: Any) -> Any:
        """A copy into an existing tensor on the other device."""
        target, source = args[:2]
        asynchronous = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        self.report.operations["copy between devices"] += 1
        if target.device.type == "cpu":
            if not (asynchronous and self.is_pinned(target)):
                self.report.waits[place()] += 1
            return target
        if not (asynchronous and self.is_pinned(source)):
            self.report.blocking_copies[f"to the device, {place()}"] += 1
        with self.fake:
            return target.copy_(torch.empty(source.shape, dtype=source.dtype, device="cuda"))

    def _check_sizes(self, name: str, args: Any, kwargs: Any) -> None:
        """Operators whose results have as many elements as values say make the host wait."""
        waits = name in _SIZED_BY_VALUES
        if name == "aten::repeat_interleave":
            waits = kwargs.get("output_size") is None
        if name in ("aten::index", "aten::index_put_", "aten::index_put"):
            indices = [x for x in args[1] if x is not None]
            waits = any(x.dtype in (torch.bool, torch.uint8) or not x.is_cuda for x in indices)
            if name != "aten::index" and len(indices) == 1 and args[2].numel() == 1:
                waits = False  # torch fills by the mask
        if waits:
            self.report.waits[f"{name} {place()}"] += 1

    def _count(self, func: Any, name: str, args: Any, tensors: list[Tensor], out: Any) -> None:
        """Counts launches, bytes and the FLOPs of matmuls."""
        short = name.removeprefix("aten::")
        if func.is_view or name in _WITHOUT_KERNEL or short.startswith(("empty", "new_empty")):
            return
        report = self.report
        report.operations[short] += _num_launches(short, args)
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        report.bytes += sum(_bytes(x) for x in tensors) + sum(_bytes(x) for x in outputs)
        matrices = [x for x in tensors if x.dim() >= 2][-2:]
        if short.rstrip("_") in ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "_scaled_mm"):
            a, b = matrices
            rows = a.shape[0] if short == "_grouped_mm" and b.dim() == 3 else a[..., 0].numel()
            report.matmul_flops[str(a.dtype)] += 2 * rows * a.shape[-1] * b.shape[-1]


def _largest(name: str, args: Any) -> Tensor | None:
    """The result of an operator sized by values, as if every element counted."""
    if name == "aten::nonzero":
        return args[0].new_zeros(args[0].numel(), args[0].dim(), dtype=torch.int64)
    if name == "aten::masked_select":
        return args[0].new_zeros(args[0].numel())
    return None


def _without_masks(name: str, args: Any) -> Any:
    """The arguments of an indexing operator, with masks as if all their elements were True."""
    if name not in ("aten::index", "aten::index_put", "aten::index_put_"):
        return args
    indices: list[Tensor | None] = []
    for index in args[1]:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        same = index.new_zeros(index.numel(), dtype=torch.int64) if is_mask else index
        indices += [same] * (index.dim() if is_mask else 1)
    return args[0], indices, *args[2:]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _num_launches(name: str, args: Any) -> int:
    """One, but for multi-tensor operators, whose launches take so many tensors and blocks."""
    if not name.startswith(("_foreach", "_fused")):
        return 1
    lists = [x for x in args if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor)]
    sizes = [max(x.numel() for x in same) for same in zip(*lists[:5], strict=False)]
    chunks = sum(-(-size // _FOREACH_CHUNK) for size in sizes)
    by_tensors = -(-len(sizes) // _FOREACH_TENSORS[min(len(lists), 5)])
    return max(by_tensors, -(-chunks // _FOREACH_BLOCKS), 1)
