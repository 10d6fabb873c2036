"""Which rank is slow, in metrics.jsonl, wandb, the log and the report."""

from pathlib import Path

import pytest

from tests.distributed import spawn
from tests.trainer.tiny import Job, train_jobs
from trainer.config import load_config
from trainer.metrics.flatten import flatten
from trainer.metrics.jsonl import read_metrics
from trainer.metrics.rank_times import REPEAT_STEPS, WINDOW_STEPS, RankTimes
from trainer.report import write_report

HOSTS = ["a", "a", "b", "b"]


def test_a_rank_is_compared_with_the_others_of_its_stage() -> None:
    times = [1.0, 1.2, 5.0, 5.5]
    two_stages = RankTimes(HOSTS, 2, print).slowest(times)
    assert (two_stages.rank, two_stages.host) == (1, "a")
    assert two_stages.excess == pytest.approx(0.2)
    one_stage = RankTimes(HOSTS, 1, print).slowest(times)
    assert (one_stage.rank, one_stage.excess) == (3, pytest.approx(5.5 / 1.2 - 1))
    assert RankTimes(HOSTS, 4, print).slowest(times).rank == 3  # a rank for each stage


def test_a_slow_rank_is_logged_once_and_another_at_once() -> None:
    lines: list[str] = []
    times = RankTimes(HOSTS, 1, lines.append)
    for step in range(1, 2 * WINDOW_STEPS + 1):
        times.add(step, [1.0, 1.05, 1.0, 1.3])
    assert lines == [
        f"step {WINDOW_STEPS}: rank 3 on b is slow: in the last {WINDOW_STEPS} steps it worked "
        "1.300 s per step, 30% longer than the median of the ranks with the same work, which wait "
        "for it"
    ]
    for step in range(2 * WINDOW_STEPS + 1, 3 * WINDOW_STEPS + 1):
        times.add(step, [1.4, 1.0, 1.0, 1.0])
    assert "rank 0 on a is slow" in lines[1]
    for step in range(3 * WINDOW_STEPS + 1, 4 * WINDOW_STEPS + 1):
        times.add(step, [1.0, 1.0, 1.0, 1.09])
    for step in range(REPEAT_STEPS + 1, REPEAT_STEPS + 3 * WINDOW_STEPS + 1):
        times.add(step, [1.4, 1.0, 1.0, 1.0])
    assert len(lines) == 3


def test_points_are_means_over_the_steps_between_them() -> None:
    times = RankTimes(HOSTS[:2], 1, print)
    times.add(1, [1.0, 2.0])
    times.add(2, [3.0, 4.0])
    times.add(3, ())  # its batch was skipped
    point = times.take()
    assert point["work_seconds"] == [2.0, 3.0]
    assert point["slowest"] == {"rank": 1, "host": "a", "excess": 0.5}
    assert times.take() == {}
    assert flatten({"step": 3, **point})["slowest/excess"] == 0.5
    alone = RankTimes(["a"], 1, print)
    alone.add(1, [1.0])
    assert alone.take() == {}


def test_a_run_on_two_ranks_has_both_in_its_metrics_and_report(tiny: Path, tmp_path: Path) -> None:
    jobs: list[Job] = [("run", ["steps=6", "metrics.every=2"], 0)]
    spawn(train_jobs, 2, tiny, tmp_path, jobs)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [len(record.get("work_seconds", ())) for record in records] == [0, 2, 0, 2, 0, 2]
    for record in records[1::2]:
        assert all(0 < seconds < 10 for seconds in record["work_seconds"])
        assert record["slowest"]["rank"] in (0, 1) and record["slowest"]["host"]
    html = write_report(load_config(tiny, [f"run_dir={tmp_path / 'run'}"])).read_text()
    assert "Work of each rank" in html and "The slowest was most often rank" in html
