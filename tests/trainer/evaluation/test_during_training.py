"""Tasks that a run evaluates between its steps, on any ranks; training is as without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import trainer.evaluation.harness
from tests.distributed import spawn
from tests.trainer.evaluation.tasks import write_tasks
from tests.trainer.tiny import train
from trainer.config import RunConfig, load_config
from trainer.metrics import read_metrics
from trainer.metrics.flatten import flatten
from trainer.report import write_report

STEPS = ["steps=2", "checkpoint.every=0", "evaluation.every=2"]


def settings(files: list[Path]) -> list[str]:
    names = ", ".join(map(str, files))
    return [*STEPS, f"evaluation.tasks=[{names}]", "evaluation.tasks_every=1"]


def records_of(config: RunConfig) -> list[dict[str, Any]]:
    return read_metrics(config.run_dir / "metrics.jsonl")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_tasks(tmp_path_factory.mktemp("tasks"), questions=6)


@pytest.fixture(scope="module")
def run(tiny: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    chosen = settings([files["choice"], files["until"]])
    return train(tiny, tmp_path_factory.mktemp("tasks") / "run", *chosen)


def test_scores_are_in_the_metrics_of_their_steps(run: RunConfig) -> None:
    first, second = records_of(run)
    assert "validation_loss" not in first and "validation_loss" in second
    for record in (first, second):
        assert record["tasks"].keys() == {
            *("choice/acc", "choice/acc_stderr"),
            *("until/exact_match", "until/exact_match_stderr"),
        }
        assert flatten(record)["tasks/choice/acc"] == record["tasks"]["choice/acc"]


def test_they_change_nothing_of_the_training(run: RunConfig, tiny: Path, tmp_path: Path) -> None:
    without = train(tiny, tmp_path / "run", *STEPS)
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in records_of(without)] == [r[name] for r in records_of(run)]


def test_the_report_has_them_over_steps(run: RunConfig) -> None:
    page = write_report(run).read_text()
    assert "Scores in tasks of lm-eval" in page and "<th>step 1</th><th>step 2</th>" in page
    assert "<td>choice/acc</td>" in page and 'aria-label="Tasks"' in page


def test_a_failure_of_lm_eval_is_a_warning(
    tiny: Path,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: Any) -> None:
        raise ValueError("a metric")

    monkeypatch.setattr(trainer.evaluation.harness, "run_tasks", fail)
    config = train(tiny, tmp_path / "run", *settings([files["choice"]]), "steps=1")
    assert "tasks were not evaluated: lm-eval: ValueError: a metric" in capsys.readouterr().out
    assert "tasks" not in records_of(config)[0]


def train_on_rank(rank: int, world_size: int, path: Path, folder: Path, jobs: Any) -> None:
    for name, chosen in jobs:
        train(path, folder / name, *chosen)


@pytest.mark.slow
def test_ranks_have_the_same_scores(
    run: RunConfig, tiny: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    both, scored = [files["choice"], files["until"]], [files["choice"]]
    jobs = [
        ("experts", [*settings(both), "parallel.tensor=2", "parallel.expert=2"]),
        ("context", [*settings(both), "parallel.context=2"]),
        ("pipeline", [*settings(scored), "parallel.pipeline=2"]),
        ("data", settings(scored)),
    ]
    spawn(train_on_rank, 2, tiny, tmp_path, jobs)
    expected = records_of(run)[-1]["tasks"]
    for name, _ in jobs:
        config = load_config(tiny, [f"run_dir={tmp_path / name}"])
        scores = records_of(config)[-1]["tasks"]
        assert scores == pytest.approx({key: expected[key] for key in scores})
        assert scores
