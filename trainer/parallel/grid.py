"""The device mesh of a run: its processes and their process groups. An argument, never a global.

Every process has coordinates in two meshes over all ranks, both made by megatron-core's
HyperCommGrid, the first name varying fastest from rank to rank:

    dense weights    tensor x context x data x pipeline
    routed experts   expert_tensor x expert x expert_data x pipeline

The pipeline axis is the slowest of both, so the ranks of one pipeline coordinate are the same
consecutive ones in either mesh. Within them, expert and tensor degrees do not depend on each other.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from trainer.parallel.degrees import DENSE_AXES, EXPERT_AXES, Degrees
from trainer.parallel.waits import Collective, Waits

_SHORT = {
    "tensor": "tp",
    "context": "cp",
    "data": "dp",
    "pipeline": "pp",
    "expert_tensor": "etp",
    "expert": "ep",
    "expert_data": "edp",
}


class Traffic:
    """Bytes that this rank has sent, by (axis, collective), how often, and its waits meanwhile.

    Counted as ring algorithms send them: an all-gather (n-1) times its part, a reduce-scatter
    (n-1)/n of its input, an all-reduce both, an all-to-all everything that is not for this rank
    itself. trainer/planning/traffic.py computes what a step should send.
    """

    def __init__(self, device: torch.device) -> None:
        self.waits = Waits(device)
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()

    def add(self, axis: str, collective: str, size: float) -> None:
        """Counts one call that sent `size` bytes."""
        self.bytes[axis, collective] += round(size)
        self.calls[axis, collective] += 1

    def clear(self) -> None:
        """Sets all counts to zero."""
        self.bytes.clear()
        self.calls.clear()


@dataclass(frozen=True)
class Axis:
    """One process's rank along an axis of the mesh, or along several axes flattened into one.

    `group` is None where there is one process; collectives over such an axis do nothing.
    """

    name: str
    rank: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    traffic: Traffic = field(compare=False)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.ranks)

    def call(self, collective: str) -> Collective:
        """Returns this process's next call of a collective on the axis."""
        return self.traffic.waits.number(collective, self.name, self.ranks)

    def waiting(self, collective: str | Collective) -> AbstractContextManager[None]:
        """Returns a context that measures a collective, or the wait for one that has started."""
        if isinstance(collective, str):
            collective = self.call(collective)
        return self.traffic.waits.during(collective)

    @property
    def is_first(self) -> bool:
        """Whether this process is the first rank."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this process is the last rank."""
        return self.rank == self.size - 1


@dataclass(frozen=True)
class Grid:
    """This process's coordinates and process groups.

    Attributes:
        tensor: ranks that shard heads, output groups, vocabulary and the shared expert.
        context: ranks that shard rows of tokens.
        sequence: context x tensor flattened, tensor fastest; each rank holds different tokens.
        data: ranks with different rows.
        pipeline: ranks with different layers.
        stage: all ranks with the same pipeline coordinate; they may hold several stages of layers.
        tensor_replicas: context and data flattened: ranks that hold the same tensor shard.
        expert_all_to_all: expert x expert_tensor flattened, expert_tensor fastest: the ranks of the
            all-to-all that sends tokens to experts.
        expert_tensor: ranks that shard each expert.
        expert_data: ranks that hold the same experts.
        embedding: the first and the last pipeline rank; where both hold the embedding
            (`embedding_is_replicated`), its gradients are summed over them.
        world: all ranks.
    """

    rank: int
    world_size: int
    device: torch.device
    degrees: Degrees
    traffic: Traffic
    tensor: Axis
    context: Axis
    sequence: Axis
    data: Axis
    pipeline: Axis
    stage: Axis
    tensor_replicas: Axis
    expert_all_to_all: Axis
    expert_tensor: Axis
    expert_data: Axis
    embedding: Axis
    world: Axis

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the run's files and logs."""
        return self.rank == 0

    @classmethod
    def single(cls, device: torch.device | None = None) -> Grid:
        """One process without torch.distributed, on the CPU unless there is a `device`."""
        return cls.build(Degrees(1), device or torch.device("cpu"))

    @classmethod
    def build(cls, degrees: Degrees, device: torch.device) -> Grid:
        """Returns the grid over the default process group.

        It must be initialised unless the world size is 1.
        """
        rank = dist.get_rank() if degrees.world_size > 1 else 0
        traffic = Traffic(device)
        dense = _Mesh(DENSE_AXES, degrees, rank, traffic)
        expert = _Mesh(EXPERT_AXES, degrees, rank, traffic)
        return cls(
            rank=rank,
            world_size=degrees.world_size,
            device=device,
            degrees=degrees,
            traffic=traffic,
            tensor=dense.axis("tensor", "tensor"),
            context=dense.axis("context", "context"),
            sequence=dense.axis("sequence", "tensor", "context"),
            data=dense.axis("data", "data"),
            pipeline=dense.axis("pipeline", "pipeline"),
            stage=dense.axis("stage", "tensor", "context", "data"),
            tensor_replicas=dense.axis("tensor_replicas", "context", "data"),
            expert_all_to_all=expert.axis("expert_all_to_all", "expert_tensor", "expert"),
            expert_tensor=expert.axis("expert_tensor", "expert_tensor"),
            expert_data=expert.axis("expert_data", "expert_data"),
            embedding=dense.ends("embedding", "pipeline"),
            world=dense.axis("world", *DENSE_AXES),
        )

    def divide(self, axes: Sequence[tuple[Axis, int]]) -> list[tuple[Axis, Axis]]:
        """Splits each axis in two: an inner one of `size` consecutive ranks, and an outer one.

        The outer axis has the ranks with the same index on their inner axes.

        Both get new process groups, so a collective on them may overlap with one on the axis.
        A collective call: all ranks of the grid make it together, and the ranks of an axis pass the
        same size. The new axes are called `data/4` and `data*2`, for example.
        """
        parts = []
        for axis, size in axes:
            first = axis.rank // size * size
            inner, outer = axis.ranks[first : first + size], axis.ranks[axis.rank % size :: size]
            names = f"{axis.name}/{size}", f"{axis.name}*{len(outer)}"
            for name, ranks in zip(names, (inner, outer), strict=True):
                parts.append(Axis(name, ranks.index(self.rank), ranks, None, self.traffic))
        groups = self._groups_of({part.ranks for part in parts if part.size > 1})
        grouped = [replace(part, group=groups.get(part.ranks)) for part in parts]
        return list(zip(grouped[::2], grouped[1::2], strict=True))

    def _groups_of(self, wanted: set[tuple[int, ...]]) -> dict[tuple[int, ...], dist.ProcessGroup]:
        """Creates process groups; all ranks create all groups, in the same order."""
        of_ranks = [wanted]
        # On the meta device there are no other ranks (trainer.planning.dry_run).
        if self.world.group is not None and self.device.type != "meta":
            of_ranks = [set()] * self.world_size
            with self.world.waiting("all_gather_object"):
                dist.all_gather_object(of_ranks, wanted, group=self.world.group)
        return {ranks: dist.new_group(list(ranks)) for ranks in sorted(set().union(*of_ranks))}


class _Mesh:
    """One mesh and its axes; each process group is created once, and only if it is used."""

    def __init__(self, names: Sequence[str], degrees: Degrees, rank: int, traffic: Traffic) -> None:
        self.names, self.rank, self.traffic = names, rank, traffic
        self.degrees = dict(zip(names, degrees.of(names), strict=True))
        self.world_size = degrees.world_size
        self._axes: dict[tuple[str, ...], Axis] = {}
        if degrees.world_size > 1:
            with warnings.catch_warnings(action="ignore"):  # about absent NVIDIA packages
                from megatron.core.hyper_comm_grid import HyperCommGrid  # takes seconds

            self.grid = HyperCommGrid(degrees.of(names), [_SHORT[name] for name in names])

    def axis(self, name: str, *over: str) -> Axis:
        """Returns the axis named `name` that flattens the mesh axes `over`."""
        larger = tuple(part for part in over if self.degrees[part] > 1)
        if not larger:
            return Axis(name, 0, (self.rank,), None, self.traffic)
        if larger not in self._axes:
            self._axes[larger] = self._make(larger)
        return replace(self._axes[larger], name=name)

    def _make(self, names: tuple[str, ...]) -> Axis:
        dims = [_SHORT[name] for name in names]
        ranks = next(ranks for ranks in self.grid.get_rank_enum(dims) if self.rank in ranks)
        has_all = math.prod(self.degrees[name] for name in names) == self.world_size
        group = dist.group.WORLD if has_all else self.grid.create_pg(dims)
        return Axis("", ranks.index(self.rank), tuple(ranks), group, self.traffic)

    def ends(self, name: str, over: str) -> Axis:
        """Returns the axis of the first and the last rank along `over`; size 1 on other ranks."""
        trivial = Axis(name, 0, (self.rank,), None, self.traffic)
        if self.degrees[over] == 1:
            return trivial
        pairs = [[ranks[0], ranks[-1]] for ranks in self.grid.get_rank_enum(_SHORT[over])]
        group, _ = dist.new_subgroups_by_enumeration(pairs)
        pair = next((pair for pair in pairs if self.rank in pair), None)
        if pair is None:
            return trivial
        return Axis(name, pair.index(self.rank), tuple(pair), group, self.traffic)


def start_process_group(device: torch.device, **settings: Any) -> None:
    """Initialises the default process group: gloo for tensors on the host, NCCL for those on GPUs.

    `settings` are those of `torch.distributed.init_process_group`.
    """
    if device.type != "cuda":
        dist.init_process_group("gloo", **settings)
        return
    torch.cuda.set_device(device)
    # With `device_id` NCCL connects at once, and makes the smaller groups by splitting this one.
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **settings)


def connect_store(timeout_seconds: float | None = None) -> dist.Store | None:
    """Connects to the store of torchrun's processes; None where there is one process.

    They can agree on something there before there is a process group. Waits for the first of them;
    the timeout is that of `open_grid`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    limit = default_pg_timeout if timeout_seconds is None else timedelta(seconds=timeout_seconds)
    store: dist.Store = next(iter(dist.rendezvous("env://", timeout=limit)))[0]
    return store


@contextmanager
def open_grid(
    device: torch.device,
    degrees_of: Callable[[int], Degrees] = Degrees,
    timeout_seconds: float | None = None,
    store: dist.Store | None = None,
) -> Iterator[Grid]:
    """Opens the grid over the processes that torchrun's RANK and WORLD_SIZE describe.

    `device`: this process's. `degrees_of` returns the degrees for a number of processes; without
    torchrun there is one. `store`: that of `connect_store`, by default another one.
    Initialises the default process group and destroys it at a normal end. After an error it is
    left alone until the process exits: other ranks may be waiting in a collective. A collective
    that waits longer than the timeout (torch's default: 30 minutes) fails.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    degrees = degrees_of(world_size)
    if world_size == 1:
        yield Grid.build(degrees, device)
        return
    timeout = None if timeout_seconds is None else timedelta(seconds=timeout_seconds)
    members = {} if store is None else {"rank": int(os.environ["RANK"]), "world_size": world_size}
    start_process_group(device, timeout=timeout, store=store, **members)
    yield Grid.build(degrees, device)
    dist.destroy_process_group()
