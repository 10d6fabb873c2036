"""torch.cuda and pinned memory of the fake GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tests.fake_gpu.device import FakeGpu
from tests.fake_gpu.report import place

MEMORY = 80 * 2**30


class _Stream:
    """A stream on which everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Orders later work after that of another stream."""

    def wait_event(self, event: Any) -> None:
        """Orders later work after an event."""

    def record_event(self, event: Any = None) -> Any:
        """An event after all work so far."""
        return event or _Event()


class _Event:
    """An event that has happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        """Marks the work so far."""

    def wait(self, stream: Any = None) -> None:
        """Orders later work of a stream after the event."""

    def query(self) -> bool:
        """Whether it has happened."""
        return True

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds to a later event."""
        return 0.0


def _event_of(gpu: FakeGpu) -> type[_Event]:
    """Events that know what was launched after them, for the report of a wait for them."""

    class Event(_Event):
        launched = 0

        def record(self, stream: Any = None) -> None:
            self.launched = gpu.report.num_launches

        def synchronize(self) -> None:
            report, where = gpu.report, f"Event.synchronize {place()}"
            report.waits[where] += 1
            since = report.num_launches - self.launched
            report.queued[where] = min(since, report.queued.get(where, since))

    return Event


def _waiting(gpu: FakeGpu, name: str) -> Callable[..., None]:
    def wait(*args: Any, **kwargs: Any) -> None:
        gpu.report.waits[f"{name} {place()}"] += 1

    return wait


@contextmanager
def cuda_of(gpu: FakeGpu, capability: tuple[int, int]) -> Iterator[None]:
    """torch.cuda answers as a GPU of this compute capability inside the block."""
    properties = SimpleNamespace(
        name="fake GPU",
        total_memory=MEMORY,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=132,
        shared_memory_per_block_optin=232448,
    )
    stream_type = type("Stream", (_Stream,), {"synchronize": _waiting(gpu, "Stream.synchronize")})
    event_type = _event_of(gpu)
    stream = stream_type()
    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: nullcontext(),
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "max_memory_allocated": lambda device=None: 2**30,
        "memory_allocated": lambda device=None: 2**30,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "Stream": stream_type,
        "Event": event_type,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: nullcontext(),
        "synchronize": _waiting(gpu, "torch.cuda.synchronize"),
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(Tensor, "pin_memory", lambda x, *_: gpu.pin(x)))
        stack.enter_context(patch.object(Tensor, "is_pinned", lambda x, *_: gpu.is_pinned(x)))
        stack.enter_context(patch.object(Tensor, "record_stream", lambda *_: None))
        # One copy, as on a GPU, where a FakeTensor reads number by number.
        stack.enter_context(patch.object(FakeTensor, "tolist", lambda x: x.cpu().tolist()))
        stack.enter_context(patch.object(torch.accelerator, "synchronize", answers["synchronize"]))
        torch._C._set_only_lift_cpu_tensors(True)
        yield
