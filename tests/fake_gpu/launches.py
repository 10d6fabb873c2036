"""Launches of Triton kernels: grids, devices of arguments, and what a variant is compiled for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor

from tests.fake_gpu.device import FakeGpu
from tests.fake_gpu.report import place

GRID_LIMITS = (2**31 - 1, 65535, 65535)


def specialisation(value: Any, by_value: bool) -> tuple[object, ...]:
    """What Triton compiles an argument for: its type, and of integers and addresses a little more.

    `by_value` is False where the kernel asks not to specialise the argument.
    """
    if isinstance(value, Tensor):
        address = value.storage_offset() * value.element_size()
        return str(value.dtype), by_value and address % 16 == 0
    if isinstance(value, bool) or not isinstance(value, int):
        return (type(value).__name__,)
    width = "i64" if not -(2**31) <= value < 2**31 else "i32"
    if not by_value:
        return (width,)
    return width, "one" if value == 1 else "aligned" if value % 16 == 0 else ""


@contextmanager
def watch_launches(gpu: FakeGpu) -> Iterator[None]:
    """Launches nothing inside the block, and checks what is launched."""
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        report, name = gpu.report, f"{kernel.fn.__module__}.{kernel.__name__}"
        bound = dict(zip(kernel.arg_names, args, strict=False))
        bound |= {key: value for key, value in kwargs.items() if key in kernel.arg_names}
        options = tuple(sorted((k, v) for k, v in kwargs.items() if k not in bound))
        size = tuple(grid(bound) if callable(grid) else grid)
        for count, limit in zip(size, GRID_LIMITS, strict=False):
            if not 0 < count <= limit:
                report.refused[f"{name}: a grid of {size}, {place()}"] += 1
        key: list[object] = [options]
        for param in kernel.params:
            value = bound.get(param.name, param.default if param.has_default else None)
            if isinstance(value, Tensor) and value.device.type != "cuda":
                report.refused[f"{name}: {param.name} on {value.device}, {place()}"] += 1
            by_value = not param.do_not_specialize
            key.append(value if param.is_constexpr else specialisation(value, by_value))
        report.launches[name] += 1
        report.variants[name].add(tuple(key))
        tensors = [value for value in bound.values() if isinstance(value, Tensor)]
        report.bytes += sum(x.numel() * x.element_size() for x in tensors)

    with patch.object(JITFunction, "run", run):
        yield
