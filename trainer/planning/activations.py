"""Memory of activations between forward and backward, and the number of microbatches in flight.

Counts storages, not tensors: views share theirs. Works on any device, meta included.

Letters: E experts of a rank.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages:
    """A set of storages, which it keeps alive."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Adds the tensor's storage unless it is in the set already."""
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = storage

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages

    @property
    def nbytes(self) -> int:
        """Bytes of all storages."""
        return sum(storage.nbytes() for storage in self._storages.values())


class Live(TorchDispatchMode):
    """Context that tracks the bytes of all storages that operators allocate, except `known`.

    Attributes:
        now, peak: bytes alive at present, and their maximum.
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
                self._track(leaf.untyped_storage())
        return out

    def _track(self, storage: torch.UntypedStorage) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number in self._alive:
            return
        self._alive.add(number)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, number, size)

    def _release(self, number: int, size: int) -> None:
        self._alive.discard(number)
        self.now -= size


class Addresses(TorchFunctionMode):
    """Context in which meta tensors have distinct addresses; torch puts all of them at 0."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.data_ptr and args[0].is_meta:
            tensor = args[0]
            offset = tensor.storage_offset() * tensor.element_size()
            return tensor.untyped_storage()._cdata + offset
        return func(*args, **(kwargs or {}))


class GroupedShapes(TorchDispatchMode):
    """Context in which grouped matmuls of meta tensors have a shape in every dtype.

    torch's meta kernel accepts bf16 only, while its CPU kernels take any dtype.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.ops.aten._grouped_mm.default or not args[0].is_meta:
            return func(*args, **(kwargs or {}))
        a, b, ends_E = args[:3]
        shape = (len(a), b.shape[-1]) if b.dim() == 3 else (len(ends_E), len(a), b.shape[-1])
        return a.new_empty(shape)


def tensors_in(thing: Any, visited: set[int] | None = None) -> Iterator[Tensor]:
    """Yields every tensor that an object reaches through attributes, dictionaries and sequences."""
    visited = set() if visited is None else visited
    if id(thing) in visited:
        return
    visited.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, Mapping):
        for value in thing.values():
            yield from tensors_in(value, visited)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from tensors_in(value, visited)
    elif type(thing).__module__.split(".")[0] in ("model", "trainer"):
        yield from tensors_in(vars(thing), visited)


def peak_in_flight(order: Iterable[Any], activations: Mapping[int, int]) -> dict[int, int]:
    """Returns the microbatches in flight of each stage when a rank's activations peak.

    Args:
        order: the rank's actions in a schedule of torch.distributed.pipelining.
        activations: bytes of one microbatch, by stage.

    A microbatch counts from its forward to its backward; where that is split in two, to the
    second half, which is an upper bound: the first half frees some.
    """
    # Takes a second to import, and only pipelines need it.
    from torch.distributed.pipelining.schedules import BACKWARD_WEIGHT, FORWARD, FULL_BACKWARD

    alive: Counter[int] = Counter()
    best, size = dict.fromkeys(activations, 0), 0
    for action in order:
        if action is None:
            continue
        # A forward that overlaps with a backward: both microbatches are in flight for a while.
        parts = sorted(action.sub_actions or [action], key=lambda a: a.computation_type != FORWARD)
        for part in parts:
            if part.computation_type == FORWARD:
                alive[part.stage_index] += 1
            elif part.computation_type in (FULL_BACKWARD, BACKWARD_WEIGHT):
                alive[part.stage_index] -= 1
            now = sum(activations[stage] * count for stage, count in alive.items())
            if now > size:
                best, size = {stage: alive[stage] for stage in activations}, now
    return best
