"""How much memory a microbatch holds between its forward and its backward, and how many do.

Everything counts storages, not tensors: views share theirs. Works on any device, meta included.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining.schedules import BACKWARD_WEIGHT, FORWARD, FULL_BACKWARD
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages:
    """Different storages, each once; they stay alive as long as this does."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._found: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Count the tensor's storage, unless it is among these already."""
        storage = tensor.untyped_storage()
        self._found[storage._cdata] = storage

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._found

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(storage.nbytes() for storage in self._found.values())


class Live(TorchDispatchMode):
    """Context that follows the bytes of all storages that operators make, but for `known`.

    Attributes:
        now, peak: bytes alive at present, and at most.
    """

    def __init__(self, known: Storages) -> None:
        super().__init__()
        self.known = known
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf not in self.known:
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number in self._alive:
            return
        self._alive.add(number)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, number, size)

    def _gone(self, number: int, size: int) -> None:
        self._alive.discard(number)
        self.now -= size


class Addresses(TorchFunctionMode):
    """Context in which meta tensors, which all lie at 0, have addresses that tell them apart."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.data_ptr and args[0].is_meta:
            tensor = args[0]
            offset = tensor.storage_offset() * tensor.element_size()
            return tensor.untyped_storage()._cdata + offset
        return func(*args, **(kwargs or {}))


class GroupedShapes(TorchDispatchMode):
    """Context in which grouped products of meta tensors have a shape in every dtype.

    torch's own rule knows bf16 only, while its kernels for the CPU take any.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.ops.aten._grouped_mm.default or not args[0].is_meta:
            return func(*args, **(kwargs or {}))
        a, b, ends_E = args[:3]
        shape = (len(a), b.shape[-1]) if b.dim() == 3 else (len(ends_E), len(a), b.shape[-1])
        return a.new_empty(shape)


def tensors_in(thing: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that an object reaches through attributes, dictionaries and sequences."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, Mapping):
        for value in thing.values():
            yield from tensors_in(value, seen)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from tensors_in(value, seen)
    elif type(thing).__module__.split(".")[0] in ("model", "trainer"):
        yield from tensors_in(vars(thing), seen)


def most_in_flight(order: Iterable[Any], held: Mapping[int, int]) -> dict[int, int]:
    """Microbatches of each stage whose activations a rank holds when it holds most bytes.

    Args:
        order: the rank's actions in a schedule of torch.distributed.pipelining.
        held: bytes of one microbatch, by stage.

    A microbatch counts from its forward to its backward; where that is split in two, to the
    second half, which is an upper bound: the first half frees some.
    """
    alive: Counter[int] = Counter()
    best, size = dict.fromkeys(held, 0), 0
    for action in order:
        if action is None:
            continue
        # Of a forward that overlaps with a backward both are held for a while.
        parts = sorted(action.sub_actions or [action], key=lambda a: a.computation_type != FORWARD)
        for part in parts:
            if part.computation_type == FORWARD:
                alive[part.stage_index] += 1
            elif part.computation_type in (FULL_BACKWARD, BACKWARD_WEIGHT):
                alive[part.stage_index] -= 1
            now = sum(held[stage] * count for stage, count in alive.items())
            if now > size:
                best, size = {stage: alive[stage] for stage in held}, now
    return best
