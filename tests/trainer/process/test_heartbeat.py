"""How long the loop may go on without progress, by its task and the length of its steps."""

import math
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import distributed_c10d

from trainer.config import ParallelConfig, WatchdogConfig, load_config
from trainer.parallel.grid import Grid
from trainer.parallel.waits import Waits
from trainer.process.heartbeat import Heartbeat, Stopwatch, Task
from trainer.trainer import Trainer

SLOW = WatchdogConfig().slow_seconds


def beat_after(*seconds: float) -> Heartbeat:
    heartbeat = Heartbeat()
    for step, each in enumerate(seconds, 1):
        heartbeat.enter("forward and backward", step)
        heartbeat.step_ended(each)
    return heartbeat


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [([], SLOW), ([1.0] * 2, SLOW), ([1.0] * 3, 60.0), ([20.0, 20.0, 300.0], 200.0)],
)
def test_the_default_follows_the_median_of_the_steps(seconds: list[float], expected: float) -> None:
    heartbeat = beat_after(*seconds)
    heartbeat.enter("update")
    assert heartbeat.patience(WatchdogConfig()) == expected
    heartbeat.new_phase()
    assert heartbeat.patience(WatchdogConfig()) == SLOW, "steps of another length"


def test_what_takes_long_has_its_own_limit() -> None:
    heartbeat, config = beat_after(1.0, 1.0, 1.0), WatchdogConfig(seconds=5.0, slow_seconds=40.0)
    tasks: tuple[Task, ...] = (
        *("saving", "rolling back", "layer stats", "starting", "reading data", "metrics"),
        *("first evaluation", "continuing prompts"),
    )
    for task in tasks:
        heartbeat.enter(task)
        assert heartbeat.patience(config) == 40.0, task
    heartbeat.enter("evaluation")
    assert heartbeat.patience(config) == 5.0


def test_the_report_comes_before_the_timeout_of_a_collective() -> None:
    heartbeat, waits = beat_after(1.0, 1.0, 1.0), Waits(torch.device("cpu"))
    heartbeat.follow(waits, timeout=100.0)
    heartbeat.enter("saving")
    assert heartbeat.patience(WatchdogConfig()) == SLOW
    with waits.during(waits.number("barrier", "world", (0, 1))):
        assert heartbeat.patience(WatchdogConfig()) == pytest.approx(90.0)
        assert heartbeat.collective is not None


def test_the_default_timeout_is_that_of_the_process_group() -> None:
    backend = distributed_c10d.Backend("cpu:gloo,cuda:nccl")
    default = distributed_c10d._get_default_timeout(backend).total_seconds()
    assert ParallelConfig().collective_timeout == default
    assert ParallelConfig(timeout_seconds=70).collective_timeout == 70.0


def test_beats_and_collectives_are_progress() -> None:
    heartbeat, waits = Heartbeat(), Waits(torch.device("cpu"))
    heartbeat.follow(waits, math.inf)
    seen = [heartbeat.progress]
    heartbeat.enter("saving")
    seen.append(heartbeat.progress)
    with waits.during(waits.number("barrier", "world", (0, 1))):
        seen.append(heartbeat.progress)
    seen.append(heartbeat.progress)
    assert len(set(seen)) == 4


def test_time_in_which_the_watcher_itself_stood_still_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([0.0, 0.0, 1.0, 2.0, 500.0, 501.0])  # the process was stopped in between
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    stopwatch = Stopwatch(max_gap=2.0)
    assert [stopwatch.seconds("same") for _ in range(4)] == [0.0, 1.0, 2.0, 4.0]
    assert stopwatch.seconds("other") == 0.0


def test_a_first_evaluation_and_prompts_are_reported(tiny: Path, tmp_path: Path) -> None:
    tasks: list[Task] = []

    class Recorded(Heartbeat):
        def enter(self, task: Task, step: int | None = None) -> None:
            tasks.append(task)
            super().enter(task, step)

    evaluation = "evaluation={every: 1, max_rows: 8, prompts: [ab], prompt_tokens: 2}"
    config = load_config(tiny, [f"run_dir={tmp_path}", "steps=2", evaluation])
    Trainer(config, Grid.single(), heartbeat=Recorded()).run()
    assert tasks.count("first evaluation") == 1
    assert tasks.count("continuing prompts") == 2 * (1 + 2), "each time, and at every token"
    assert tasks.count("evaluation") > 2
