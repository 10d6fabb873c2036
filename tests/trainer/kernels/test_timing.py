"""What is timed, and which implementation is chosen for its times, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from model.kernel_cases import Case
from model.kernels.operations import Choice
from trainer.kernels import timing
from trainer.kernels.examine import Bench, Examination
from trainer.kernels.fit import Variant
from trainer.kernels.timing import milliseconds

LEAVES = {"x": torch.ones(64, 32), "w": torch.ones(32)}


class Clock:
    """Runs each call, and takes as long as the numbers say, the last one from then on."""

    def __init__(self, *times: float) -> None:
        self.times = list(times)
        self.calls = 0

    def __call__(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        out = []
        for call in calls:
            self.calls += 1
            call()
            out.append(self.times.pop(0) if len(self.times) > 1 else self.times[0])
        return out


def square(x: Tensor, w: Tensor) -> Tensor:
    return (x * w).square()


def case_of(weight: float = 1.0, differentiable: bool = True) -> Case:
    return Case(
        "a square",
        LEAVES,
        lambda choice: square,
        weight=weight,
        differentiable=differentiable,
    )


def test_the_median_after_warm_ups():
    # Three warm-ups; half a second has room for five calls as long as the last of them.
    clock = Clock(9e9, 9e9, 100.0, 100.0, 900.0, 100.0, 100.0, 200.0)
    assert milliseconds(case_of(), square, clock, 0) == 100.0
    assert clock.calls == 8


@pytest.mark.parametrize(("time", "calls"), [(0.0, 30), (50.0, 10), (4000.0, 5)])
def test_calls_within_a_budget(time, calls):
    clock = Clock(time)
    milliseconds(case_of(), square, clock, 0)
    assert clock.calls == 3 + calls


def test_inputs_take_turns_among_copies_larger_than_the_cache():
    places: list[int] = []

    def seen(x: Tensor, w: Tensor) -> Tensor:
        places.append(x.data_ptr())
        return square(x, w)

    size = sum(x.numel() * 4 for x in LEAVES.values())
    milliseconds(case_of(), seen, Clock(50.0), 3 * size)
    assert len(set(places)) == 7
    assert all(a != b for a, b in pairwise(places[1:]))


@pytest.mark.parametrize("time", [0.0, 50.0])
def test_of_small_inputs_every_call_has_a_copy_that_the_cache_does_not_hold(time, monkeypatch):
    places: list[int] = []
    overwrite = timing.overwrite_cache

    def overwritten(device: torch.device, cache_bytes: int) -> None:
        places.clear()
        overwrite(device, cache_bytes)

    def seen(x: Tensor, w: Tensor) -> Tensor:
        places.append(x.data_ptr())
        return square(x, w)

    monkeypatch.setattr(timing, "overwrite_cache", overwritten)
    size = sum(x.numel() * 4 for x in LEAVES.values())
    clock = Clock(time)
    milliseconds(case_of(), seen, clock, 100 * size)
    assert len(places) == len(set(places)) == clock.calls


@pytest.mark.parametrize("differentiable", [True, False])
def test_backward_is_timed_with_forward(differentiable):
    backwards: list[int] = []

    def watched(x: Tensor, w: Tensor) -> Tensor:
        out = square(x, w)
        if out.requires_grad:
            out.register_hook(lambda grad: backwards.append(0))
        return out

    milliseconds(case_of(differentiable=differentiable), watched, Clock(1000.0), 0)
    assert len(backwards) == (8 if differentiable else 0)


def nothing_compiled(call: Callable[[], object]) -> list[Variant]:
    return []


def chosen(eager: float, *times: float) -> tuple[str, dict[str, int], str]:
    """The choice among eager and Triton with blocks of 1, 2, ... that take these times."""
    candidates = [Choice("triton", {"block": i + 1}) for i in range(len(times))]
    examination = Examination(candidates)
    clock = Clock(*[t for time in (eager, *times) for t in [time] * 8])
    bench = Bench(torch.device("cpu"), nothing_compiled, lambda variants: None, clock, 0)
    examination.compare(case_of(), bench)
    examination.time(case_of(), bench)
    verdict = examination.verdict("norms")
    return verdict.choice, dict(verdict.blocks), verdict.reason


def test_the_fastest_block_size_wins():
    choice, blocks, reason = chosen(900.0, 600.0, 300.0, 400.0)
    assert (choice, blocks) == ("triton", {"block": 2})
    assert reason == "triton is 3.00 times as fast as eager"


@pytest.mark.parametrize(("time", "choice"), [(980.0, "eager"), (960.0, "triton")])
def test_a_gain_of_three_per_cent_is_asked_for(time, choice):
    assert chosen(1000.0, time)[0] == choice


def test_a_slower_kernel_is_right_and_not_chosen():
    choice, blocks, reason = chosen(1000.0, 1500.0)
    assert (choice, blocks) == ("eager", {"block": 1})
    assert reason == "triton takes 1.50 times as long as eager"


def test_times_count_as_often_as_a_model_runs_them():
    examination = Examination([Choice("triton", {})])
    bench = Bench(torch.device("cpu"), nothing_compiled, lambda variants: None, Clock(200.0), 0)
    for weight in (3.0, 0.0, 1.0):
        examination.compare(case_of(weight), bench)
        examination.time(case_of(weight), bench)
    assert examination.verdict("norms").milliseconds == {"eager": 800.0, "triton": 800.0}
