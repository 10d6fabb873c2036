"""Saved activations in host memory between forward and backward.

On a GPU the copies run on a stream of their own: to the host while the part that saved the tensor
computes, and back while backward computes the part after it. The host waits for none of them, and
the device for a copy only where it is slower than a part.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from optim.zero import page_locked_bytes


class HostOffload:
    """Moves what the parts of a model save, call by call.

    The device holds the tensors of two parts at most: the one that computes, and in forward the one
    before, in backward the one that comes next.

    Attributes:
        meta_bytes: page-locked bytes that all meta tensors so far would take (`saving`).
    """

    def __init__(self) -> None:
        self.meta_bytes = 0
        self._module: Any = None
        self._stream: Any = None
        self._leaving: list[tuple[Tensor, Any]] = []
        self._last: weakref.ref[_SavedPart] | None = None

    def saving(self, device: torch.device, microbatch: object) -> saved_tensors_hooks:
        """Returns a context for one call of a part: what is saved inside is on the host.

        `microbatch` is any object that the parts of a microbatch share: backward goes through them
        in reverse. Of meta tensors only the shape is saved (trainer.planning.dry_run).
        """
        if device.type == "meta":
            return saved_tensors_hooks(
                self._count,
                lambda packed: torch.empty(packed[0], dtype=packed[1], device=device),
            )
        if self._stream is None:
            # On a CPU streams do nothing, and the copies are plain ones.
            self._module = torch.get_device_module("cuda" if device.type == "cuda" else "cpu")
            self._stream = self._module.Stream()
        self.release()
        before = self._last() if self._last is not None else None
        if before is not None and before.microbatch is not microbatch:
            before = None
        part = _SavedPart(self, microbatch, before)
        self._last = weakref.ref(part)
        return saved_tensors_hooks(part.pack, part.unpack)

    def _count(self, saved: Tensor) -> tuple[torch.Size, torch.dtype]:
        if saved.is_floating_point():
            self.meta_bytes += page_locked_bytes(saved.nbytes)
        return saved.shape, saved.dtype

    def to_host(self, tensor: Tensor) -> Tensor:
        """Starts a copy to page-locked memory. The device's tensor is held until `release`."""
        copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self._leaving.append((tensor, self._start(copy, tensor)))
        return copy

    def to_device(self, tensor: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """Starts a copy; returns it and the event at its end, for which its reader has to wait."""
        # Allocated on the current stream, whose later work reads it, and reuses its memory.
        copy = torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device
        )
        return copy, self._start(copy, tensor)

    def _start(self, copy: Tensor, tensor: Tensor) -> Any:
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            copy.copy_(tensor, non_blocking=True)
            done = self._module.Event()
            done.record()
        return done

    def release(self) -> None:
        """Frees the tensors that are being copied to the host.

        Later work on the current stream, which may reuse their memory, waits for the copies.
        """
        for _, done in self._leaving:
            done.wait()
        self._leaving.clear()


class _SavedPart:
    """What one call of a part saved; autograd holds it through the hooks.

    `before` is the part whose backward comes next.
    """

    def __init__(self, offload: HostOffload, microbatch: object, before: _SavedPart | None) -> None:
        self.offload, self.microbatch = offload, microbatch
        self.before = None if before is None else weakref.ref(before)
        self.on_host: list[tuple[Tensor, torch.device]] = []
        self.on_device: dict[int, tuple[Tensor, Any]] = {}

    def pack(self, saved: Tensor) -> Tensor | int:
        """Returns the index of the host's copy; ids of tokens and experts stay where they are."""
        if not saved.is_floating_point():
            return saved
        self.on_host.append((self.offload.to_host(saved.detach()), saved.device))
        return len(self.on_host) - 1

    def unpack(self, packed: Tensor | int) -> Tensor:
        """Returns the tensor on its device, and starts to fetch those of the part before."""
        if isinstance(packed, Tensor):
            return packed
        if packed not in self.on_device:
            self.fetch()
        tensor, done = self.on_device.pop(packed)
        done.wait()
        before = None if self.before is None else self.before()
        if before is not None:
            before.fetch()
        return tensor

    def fetch(self) -> None:
        """Starts the copies of all tensors that are not on the device, nor on their way."""
        self.offload.release()
        for index, (tensor, device) in enumerate(self.on_host):
            if index not in self.on_device:
                self.on_device[index] = self.offload.to_device(tensor, device)
