"""Activation checkpointing, chosen part by part.

- `block` and `attention` save only their input and repeat forward in backward, communication
  included (torch.utils.checkpoint).
- `streams` drops the residual streams between attention and experts, half of the streams that a
  block saves; `norms` drops the outputs of attn_norm and ffn_norm. Both are recomputed from tensors
  that are saved anyway, with an N x N by N x D matmul per token, or one norm, and without
  communication (report §3.4, recomputation of mHC's tensors; docs/architecture-v4.md).

The saved input of `block` and `attention` can be in host memory until backward (offload.py).

Letters: N residual streams, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from model.execution import BlockPart
from trainer.parallel.offload import HostOffload


class ActivationCheckpointing:
    """`Execution.call_part` that recomputes `parts` in backward.

    The saved inputs of the parts in `offload` (`block` or `attention`) are in host memory until
    backward.
    """

    def __init__(self, parts: Collection[BlockPart], offload: Collection[BlockPart] = ()) -> None:
        self.parts, self.offload = frozenset(parts), frozenset(offload)
        self.host = HostOffload()
        self._dropped: dict[tuple[Any, ...], _Dropped] | None = None

    def __call__(self, part: BlockPart, function: Callable[..., Any], *inputs: Any) -> Any:
        """Calls the function; saves less for backward if the part is one to recompute."""
        needed = any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        if not (needed and torch.is_grad_enabled()):
            return function(*inputs)  # no_grad, or only indexers are trained
        if part == "block":
            return self._block(function, *inputs)
        if part not in self.parts:
            return function(*inputs)
        if part == "attention":
            return self._checkpoint(part, function, *inputs)
        out = function(*inputs)
        if self._dropped is not None:
            self._dropped[_key(out)] = _Dropped(out, function, inputs)
        return out

    def _checkpoint(self, part: BlockPart, function: Callable[..., Any], *inputs: Any) -> Any:
        if part not in self.offload:
            return _checkpoint(function, *inputs)
        microbatch = next((x for x in inputs if not isinstance(x, Tensor)), None)  # its positions
        with self.host.saving(inputs[0].device, microbatch):
            return _checkpoint(function, *inputs)

    def _block(self, function: Callable[..., Any], *inputs: Any) -> Any:
        if "block" in self.parts:
            return self._checkpoint("block", function, *inputs)
        if not self.parts & {"streams", "norms"}:
            return function(*inputs)
        # Results are keyed by their address, which is not reused while `dropped` holds them.
        dropped: dict[tuple[Any, ...], _Dropped] = {}
        self._dropped = dropped
        try:
            with saved_tensors_hooks(lambda saved: dropped.get(_key(saved), saved), _unpack):
                return function(*inputs)
        finally:
            for result in dropped.values():
                result.forget()
            self._dropped = None


class _Dropped:
    """A result that is recomputed when backward first needs it."""

    def __init__(self, out: Tensor, function: Callable[..., Tensor], inputs: Any) -> None:
        self._out: Tensor | None = out
        self._function = function
        self._inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]

    def forget(self) -> None:
        """Frees the result, at the end of forward."""
        self._out = None

    def get(self) -> Tensor:
        """Returns the result, recomputed at the first call."""
        if self._out is None:
            with torch.no_grad():
                self._out = self._function(*self._inputs)
        return self._out


def _unpack(saved: Tensor | _Dropped) -> Tensor:
    return saved.get() if isinstance(saved, _Dropped) else saved


def _key(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _checkpoint(function: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
