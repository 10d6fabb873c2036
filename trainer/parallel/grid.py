"""The processes of a run and the groups they form. Passed on explicitly, never looked up.

Every process has one place in two divisions of the world, both by megatron-core's HyperCommGrid,
the first name varying fastest from rank to rank:

    dense weights    tensor x context x data x pipeline
    routed experts   expert_tensor x expert x expert_data x pipeline

The pipeline axis is the slowest of both, so that a stage is one run of ranks either way, and the
expert axes divide a stage's ranks anew: expert and tensor degrees do not depend on each other.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from trainer.parallel.degrees import DENSE, EXPERT, Degrees

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
    """Bytes that this rank has sent, by (axis, collective), and how often.

    Counted as a ring sends them: a gather (n-1) times its part, a scatter (n-1)/n of its whole,
    a sum (or maximum) both, an exchange everything that is not for this rank itself. What a step
    should send, traffic.py says.
    """

    def __init__(self) -> None:
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()

    def add(self, axis: str, collective: str, size: float) -> None:
        """One call that sent `size` bytes."""
        self.bytes[axis, collective] += round(size)
        self.calls[axis, collective] += 1

    def clear(self) -> None:
        """Start anew."""
        self.bytes.clear()
        self.calls.clear()


@dataclass(frozen=True)
class Axis:
    """One process's place on an axis, or on several taken together.

    `group` is None where there is one process; collectives over such an axis do nothing.
    """

    name: str
    rank: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    traffic: Traffic = field(compare=False)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return len(self.ranks)

    @property
    def is_first(self) -> bool:
        """Whether this process is the first of them."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this process is the last of them."""
        return self.rank == self.size - 1


@dataclass(frozen=True)
class Grid:
    """This process's place among all processes.

    Attributes:
        tensor: ranks that split heads, groups, vocabulary and the shared expert.
        context: ranks that split rows of tokens.
        sequence: tensor and context together: each holds tokens of its own.
        data: ranks that have rows of their own.
        pipeline: ranks that hold layers of their own.
        stage: all ranks of a pipeline stage; they hold the same weights but for split ones.
        split: ranks that hold the same part of a weight that tensor ranks split.
        expert: ranks that tokens are exchanged over (with expert_tensor inside).
        expert_tensor: ranks that split each expert.
        expert_data: ranks that hold the same experts.
        tied: first and last pipeline rank of this rank's column, which share the embedding.
        world: all of them.
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
    split: Axis
    expert: Axis
    expert_tensor: Axis
    expert_data: Axis
    tied: Axis
    world: Axis

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files and speaks for all."""
        return self.rank == 0

    @classmethod
    def single(cls, device: torch.device | None = None) -> Grid:
        """One process without torch.distributed."""
        return cls.build(Degrees(1), device or local_device(0))

    @classmethod
    def build(cls, degrees: Degrees, device: torch.device) -> Grid:
        """The grid over the default process group, which is up unless there is one process."""
        rank = dist.get_rank() if degrees.world > 1 else 0
        traffic = Traffic()
        makers = [_AxisMaker(names, degrees, rank, traffic) for names in (DENSE, EXPERT)]
        dense, expert = makers
        return cls(
            rank=rank,
            world_size=degrees.world,
            device=device,
            degrees=degrees,
            traffic=traffic,
            tensor=dense.axis("tensor", "tensor"),
            context=dense.axis("context", "context"),
            sequence=dense.axis("sequence", "tensor", "context"),
            data=dense.axis("data", "data"),
            pipeline=dense.axis("pipeline", "pipeline"),
            stage=dense.axis("stage", "tensor", "context", "data"),
            split=dense.axis("split", "context", "data"),
            expert=expert.axis("expert", "expert_tensor", "expert"),
            expert_tensor=expert.axis("expert_tensor", "expert_tensor"),
            expert_data=expert.axis("expert_data", "expert_data"),
            tied=dense.ends("tied", "pipeline"),
            world=dense.axis("world", *DENSE),
        )

    def divide(self, axes: Sequence[tuple[Axis, int]]) -> list[tuple[Axis, Axis]]:
        """Axes as runs of some ranks: this rank's run, and the same place of every run.

        Groups of their own, over which something may be on its way while the axis itself is used.
        All ranks of the grid call it together, each with its own axes and run lengths, on which the
        ranks of the axis agree. The parts are called `data/4` and `data*2`, say.
        """
        found = []
        for axis, size in axes:
            first = axis.rank // size * size
            run, same = axis.ranks[first : first + size], axis.ranks[axis.rank % size :: size]
            for name, ranks in ((f"{axis.name}/{size}", run), (f"{axis.name}*{len(same)}", same)):
                found.append(Axis(name, ranks.index(self.rank), ranks, None, self.traffic))
        groups = self._groups_of({axis.ranks for axis in found if axis.size > 1})
        whole = [replace(axis, group=groups.get(axis.ranks)) for axis in found]
        return list(zip(whole[::2], whole[1::2], strict=True))

    def _groups_of(self, wanted: set[tuple[int, ...]]) -> dict[tuple[int, ...], dist.ProcessGroup]:
        """New process groups: every rank helps to make those of all, in one order."""
        everyone = [wanted]
        # On the meta device there are no other ranks (trainer.planning.dry_run).
        if self.world.group is not None and self.device.type != "meta":
            everyone = [set()] * self.world_size
            dist.all_gather_object(everyone, wanted, group=self.world.group)
        return {ranks: dist.new_group(list(ranks)) for ranks in sorted(set().union(*everyone))}


class _AxisMaker:
    """Process groups of one division of the world; each is made once, and only if it is needed."""

    def __init__(self, names: Sequence[str], degrees: Degrees, rank: int, traffic: Traffic) -> None:
        self.names, self.rank, self.traffic = names, rank, traffic
        self.degrees = dict(zip(names, degrees.of(names), strict=True))
        self.world = degrees.world
        self._made: dict[tuple[str, ...], Axis] = {}
        if degrees.world > 1:
            with warnings.catch_warnings(action="ignore"):  # about absent NVIDIA packages
                from megatron.core.hyper_comm_grid import HyperCommGrid  # takes seconds

            self.grid = HyperCommGrid(degrees.of(names), [_SHORT[name] for name in names])

    def axis(self, name: str, *over: str) -> Axis:
        """The axis that the axes `over` form together."""
        wide = tuple(part for part in over if self.degrees[part] > 1)
        if not wide:
            return Axis(name, 0, (self.rank,), None, self.traffic)
        if wide not in self._made:
            self._made[wide] = self._make(wide)
        made = self._made[wide]
        return Axis(name, made.rank, made.ranks, made.group, self.traffic)

    def _make(self, wide: tuple[str, ...]) -> Axis:
        dims = [_SHORT[part] for part in wide]
        mine = next(ranks for ranks in self.grid.get_rank_enum(dims) if self.rank in ranks)
        everyone = math.prod(self.degrees[part] for part in wide) == self.world
        group = dist.group.WORLD if everyone else self.grid.create_pg(dims)
        return Axis("", mine.index(self.rank), tuple(mine), group, self.traffic)

    def ends(self, name: str, over: str) -> Axis:
        """First and last rank along `over`; alone for ranks between, and where they are one."""
        alone = Axis(name, 0, (self.rank,), None, self.traffic)
        if self.degrees[over] == 1:
            return alone
        pairs = [[ranks[0], ranks[-1]] for ranks in self.grid.get_rank_enum(_SHORT[over])]
        group, _ = dist.new_subgroups_by_enumeration(pairs)
        mine = next((pair for pair in pairs if self.rank in pair), None)
        if mine is None:
            return alone
        return Axis(name, mine.index(self.rank), tuple(mine), group, self.traffic)


def local_device(local_rank: int) -> torch.device:
    """The accelerator number `local_rank` of this machine, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


@contextmanager
def open_grid(
    degrees_of: Callable[[int], Degrees] = Degrees, timeout_seconds: float | None = None
) -> Iterator[Grid]:
    """The grid over the processes that torchrun's RANK, LOCAL_RANK and WORLD_SIZE describe.

    `degrees_of` gives the degrees for a number of processes; without torchrun there is one. Brings
    the process group up and takes it down at a normal end. After an error it is left to the end
    of the process: the others may be waiting inside a collective. A collective that waits longer
    than the timeout (torch's default: 10 minutes on GPUs, 30 elsewhere) is an error.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    degrees = degrees_of(world_size)
    device = local_device(int(os.environ.get("LOCAL_RANK", "0")))
    if world_size == 1:
        yield Grid.build(degrees, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=None if timeout_seconds is None else timedelta(seconds=timeout_seconds),
    )
    yield Grid.build(degrees, device)
    dist.destroy_process_group()
