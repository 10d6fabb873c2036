"""Everything that makes a process believe in its GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tests.fake_gpu.collectives import fake_ranks, watch_collectives
from tests.fake_gpu.cuda import cuda_of
from tests.fake_gpu.device import FakeGpu
from tests.fake_gpu.launches import watch_launches


@contextmanager
def fake_gpu(
    capability: tuple[int, int] = (9, 0), world: int = 1, rank: int = 0
) -> Iterator[FakeGpu]:
    """A fake GPU of this compute capability, on one rank of `world`."""
    torch.set_num_threads(1)
    gpu = FakeGpu()
    with (
        cuda_of(gpu, capability),
        watch_launches(gpu),
        watch_collectives(gpu),
        fake_ranks(world, rank),
        gpu,
    ):
        yield gpu
