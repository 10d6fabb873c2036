"""Activations that backward computes again instead of keeping, chosen part by part.

- `block` and `attention` keep only their input, and run forward once more in backward, with all
  that they communicate (torch.utils.checkpoint).
- `streams` and `norms` drop one result each, the residual streams between attention and experts
  (half of all streams that a block keeps) and the norms' outputs, and compute it again from inputs
  that are kept in any case: one product of N x N with N x D a token, or one norm, and nothing is
  communicated (report §3.4's recomputation of mHC's tensors).

Of `block` and `attention` the input that is kept can lie in the host's memory until backward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from model.execution import BlockPart


class Recompute:
    """`Execution.compute` of blocks that compute `parts` again in backward.

    The kept inputs of those among `offload`, `block` or `attention`, wait for it on the host.
    """

    def __init__(self, parts: Collection[BlockPart], offload: Collection[BlockPart] = ()) -> None:
        self.parts, self.offload = frozenset(parts), frozenset(offload)
        self._dropped: dict[tuple[Any, ...], _Dropped] | None = None

    def __call__(self, part: BlockPart, function: Callable[..., Any], *inputs: Any) -> Any:
        """The function's result, with less of it kept if the part is among those chosen."""
        needed = any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        if not (needed and torch.is_grad_enabled()):
            return function(*inputs)  # where all but the indexers is frozen, nothing is kept
        if part == "block":
            return self._block(function, *inputs)
        if part not in self.parts:
            return function(*inputs)
        if part == "attention":
            return self._checkpoint(part, function, *inputs)
        # A norm works on an fp32 copy of its input, which it would keep as well.
        out = _checkpoint(function, *inputs) if part == "norms" else function(*inputs)
        if self._dropped is not None:
            self._dropped[_key(out)] = _Dropped(out, function, inputs)
        return out

    def _checkpoint(self, part: BlockPart, function: Callable[..., Any], *inputs: Any) -> Any:
        if part not in self.offload:
            return _checkpoint(function, *inputs)
        with _on_host(inputs[0].device):
            return _checkpoint(function, *inputs)

    def _block(self, function: Callable[..., Any], *inputs: Any) -> Any:
        if "block" in self.parts:
            return self._checkpoint("block", function, *inputs)
        if not self.parts & {"streams", "norms"}:
            return function(*inputs)
        # Results are known by their memory, which is theirs as long as `_dropped` holds them.
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
    """A result that is computed again when backward first asks for it."""

    def __init__(self, out: Tensor, function: Callable[..., Tensor], inputs: Any) -> None:
        self._out: Tensor | None = out
        self._function = function
        self._inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]

    def forget(self) -> None:
        """Frees the result, at the end of forward."""
        self._out = None

    def get(self) -> Tensor:
        """The result; it stays until the last that asks for it is done."""
        if self._out is None:
            with torch.no_grad():
                self._out = self._function(*self._inputs)
        return self._out


def _unpack(saved: Tensor | _Dropped) -> Tensor:
    return saved.get() if isinstance(saved, _Dropped) else saved


def _on_host(device: torch.device) -> saved_tensors_hooks:
    """Context in which the inputs that `_checkpoint` keeps are copied to the host and back.

    Meta tensors have nothing to copy: only their shape is kept (trainer.planning.dry_run).
    """
    if device.type == "meta":
        return saved_tensors_hooks(
            lambda saved: (saved.shape, saved.dtype),
            lambda kept: torch.empty(kept[0], dtype=kept[1], device=device),
        )
    return save_on_cpu(pin_memory=device.type == "cuda")


def _key(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _checkpoint(function: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
