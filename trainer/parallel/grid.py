"""The processes of a run and the groups they form. Passed on explicitly, never looked up."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Grid:
    """This process's place among all processes; today there is only the data axis.

    `data` is the group over which gradients are summed, None when there is one process. Its
    collectives take tensors on `device` and on the CPU alike.
    """

    rank: int
    world_size: int
    device: torch.device
    data: dist.ProcessGroup | None

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files and speaks for all."""
        return self.rank == 0

    @classmethod
    def single(cls) -> "Grid":
        """One process without torch.distributed."""
        return cls(0, 1, local_device(0), None)

    @classmethod
    def of_group(cls, group: dist.ProcessGroup, device: torch.device) -> "Grid":
        """A grid over a process group that is already up."""
        return cls(dist.get_rank(group), dist.get_world_size(group), device, group)


def local_device(local_rank: int) -> torch.device:
    """The accelerator number `local_rank` of this machine, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


@contextmanager
def open_grid() -> Iterator[Grid]:
    """The grid that torchrun's RANK, LOCAL_RANK and WORLD_SIZE describe; one process without them.

    Brings the process group up and takes it down at a normal end. After an error it is left to
    the end of the process: the others may be waiting inside a collective.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Grid.single()
        return
    device = local_device(int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    assert dist.group.WORLD is not None
    yield Grid.of_group(dist.group.WORLD, device)
    dist.destroy_process_group()
