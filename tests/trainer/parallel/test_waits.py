"""What a process waits for in collectives, and for how long: on a CPU and on a GPU's stream."""

import time
from unittest.mock import patch

import torch

from tests.distributed import spawn
from trainer.parallel.collectives import all_gather, all_reduce_, all_reduce_max_, barrier
from trainer.parallel.degrees import Degrees
from trainer.parallel.grid import Grid
from trainer.parallel.waits import Waits

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SLEEP = 0.3


def late(rank: int, world_size: int) -> tuple[float, list[str], int]:
    """Rank 1 comes late to three collectives of a step, and to one between steps."""
    grid = Grid.build(Degrees(world_size), CPU)
    waits, seen = grid.traffic.waits, []
    number = waits.number

    def watched(name: str, axis: str, ranks: tuple[int, ...]) -> object:
        seen.append(f"{name} {axis} {ranks}")
        return number(name, axis, ranks)

    with patch.object(waits, "number", watched):
        for is_step in (False, True):
            waits.is_step = is_step
            for collective in (all_reduce_, all_reduce_max_, all_gather):
                time.sleep(SLEEP * rank)
                collective(torch.ones(2), grid.data)
        waits.is_step = False
        barrier(grid.world)
    assert waits.current() is None
    return waits.take_seconds(), seen, waits.calls


def test_the_ranks_that_wait_are_those_that_were_not_late() -> None:
    (first, seen, calls), (second, others, _) = spawn(late, 2)
    assert 3 * SLEEP < first + 0.05 < 3 * SLEEP + 0.25
    assert second < 0.25
    assert seen == others and len(seen) == 7 and calls == 14
    assert seen[2:4] == ["all_gather data (0, 1)", "all_reduce data (0, 1)"]


def test_work_in_the_middle_of_a_wait_does_not_count() -> None:
    waits = Waits(CPU)
    waits.is_step = True
    pipeline = waits.number("send and receive", "pipeline", (0, 1))
    with waits.during(pipeline):
        assert waits.current() == pipeline
        time.sleep(0.05)
        with waits.working():
            assert waits.current() is None
            time.sleep(0.2)
        assert waits.current() == pipeline
    assert 0.05 <= waits.take_seconds() < 0.15
    assert waits.take_seconds() == 0.0
    with waits.working():
        assert waits.current() is None


class Stream:
    """A GPU's stream that does what was queued when its clock gets there."""

    now, queued, done = 0.0, 0, 0


class Event:
    """An event of it: happens when the stream has done what was queued before."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.place, self.time = -1, 0.0

    def record(self) -> None:
        Stream.queued += 1
        self.place, self.time = Stream.queued, Stream.now

    def query(self) -> bool:
        return self.place <= Stream.done

    def elapsed_time(self, end: "Event") -> float:
        assert self.query() and end.query(), "it would wait"
        return 1000.0 * (end.time - self.time)


def test_on_a_gpu_the_stream_is_measured_and_never_waited_for() -> None:
    Stream.now, Stream.queued, Stream.done = 0.0, 0, 0
    with patch.object(torch.cuda, "Event", Event):
        waits = Waits(GPU)
        waits.is_step = True
        calls = [waits.number("all_gather", "data", (0, 1)) for _ in range(3)]
        for call in calls:
            with waits.during(call):
                Stream.now += 2.0
        assert waits.take_seconds() == 0.0 and waits.current() is None
        Stream.done = 3  # the first is over, the second has begun
        assert waits.current() == calls[1]
        assert waits.take_seconds() == 2.0
        Stream.done = 4  # between two of them
        assert waits.current() is None
        Stream.done = 6
        assert waits.take_seconds() == 4.0
        with waits.during(calls[0]):
            pass
        assert Stream.queued == 8 and len(waits._clock._free) == 4  # events are used again
