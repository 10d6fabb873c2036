"""How fast is an implementation? Forward and backward together, on inputs that no cache holds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from model.kernel_cases import Case, Function

MIN_GAIN = 0.03
"""An implementation replaces the eager one if it takes less time by this share: power limits and
other users move times by as much."""
_WARM_UPS, _MAX_CALLS, _MIN_CALLS = 3, 30, 5
_BUDGET_MS = 500.0


class Clock(Protocol):
    """Measures calls on the device."""

    def __call__(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """Runs the calls one after the other to their end; returns the milliseconds of each."""


class EventClock:
    """Measures with CUDA events, which the device records in order.

    The host does not wait between calls, as in training: where it is the faster one, its time does
    not count.
    """

    def __call__(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """Runs the calls one after the other to their end; returns the milliseconds of each."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        events[0].record()
        for call, event in zip(calls, events[1:], strict=True):
            call()
            event.record()
        torch.cuda.synchronize()
        return [float(start.elapsed_time(stop)) for start, stop in pairwise(events)]


def l2_bytes(device: torch.device) -> int:
    """Returns the size of a device's last cache; 0 on a CPU, whose times are not compared."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def milliseconds(case: Case, function: Function, clock: Clock, cache_bytes: int) -> float:
    """Returns the median time of forward, and of backward where the case has one.

    Calls take turns among copies of the inputs that are together larger than twice the cache; of
    small inputs every call has a copy of its own. The cache is overwritten before the first call.
    """
    size = sum(x.numel() * x.element_size() for x in case.leaves.values())
    copies = min(2 * cache_bytes // max(size, 1) + 1, _WARM_UPS + _MAX_CALLS)
    inputs = [_copy(case) for _ in range(copies)]
    grads = _output_gradients(case, function, inputs[0])
    overwrite_cache(inputs[0][0].device, cache_bytes)

    def call(number: int) -> None:
        leaves = inputs[number % copies]
        with torch.set_grad_enabled(case.differentiable):
            out = function(*leaves)
        if case.differentiable:
            outputs = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(outputs, leaves, grads, allow_unused=True)

    *_, last = clock([partial(call, number) for number in range(_WARM_UPS)])
    count = min(max(int(_BUDGET_MS / max(last, 1e-3)), _MIN_CALLS), _MAX_CALLS)
    return statistics.median(clock([partial(call, _WARM_UPS + i) for i in range(count)]))


def overwrite_cache(device: torch.device, cache_bytes: int) -> None:
    """Writes twice as many bytes as the cache holds, so that it holds nothing else."""
    torch.empty(2 * cache_bytes, dtype=torch.uint8, device=device).zero_()


def _copy(case: Case) -> list[Tensor]:
    return [x.clone().requires_grad_(case.differentiable) for x in case.leaves.values()]


def _output_gradients(case: Case, function: Function, leaves: list[Tensor]) -> list[Tensor]:
    if not case.differentiable:
        return []
    out = function(*leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    return [torch.ones_like(x) if x.dim() == 0 else torch.randn_like(x) for x in outputs]
