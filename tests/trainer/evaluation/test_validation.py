"""Evaluations: stopped between batches on all ranks, and as many rows as the config asks for."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed import spawn
from tests.trainer.tiny import make_tiny, train
from trainer.commands import main
from trainer.config import load_config
from trainer.config.evaluation import EvaluationConfig
from trainer.evaluation import Validation
from trainer.metrics.jsonl import read_metrics
from trainer.parallel.grid import Grid
from trainer.trainer import Trainer

SETTINGS = (
    "steps=3",
    "data.global_batch_size=2",
    "data.micro_batch_size=1",
    "evaluation={every: 1, max_rows: null}",
)


def stopped_in_an_evaluation(
    rank: int, world_size: int, tiny: Path, run_dir: Path, *settings: str
) -> tuple[int, int, bool]:
    """Trains until the last rank is asked to stop in the second batch of an evaluation.

    Returns the batches that were evaluated, the steps that were trained, and whether the validation
    loss is in the metrics.
    """
    config = load_config(tiny, [f"run_dir={run_dir}", *SETTINGS, *settings])
    grid = Grid.single()
    if world_size > 1:
        grid = Grid.build(config.degrees(world_size), torch.device("cpu"))
    trainer = Trainer(config, grid)
    plain, count = trainer.engine.evaluate, 0
    assert trainer.evaluations.validation is not None
    assert trainer.evaluations.validation.steps > 4

    def evaluate(batches: list[object]) -> Tensor:
        nonlocal count
        count += trainer.state.step > 0
        if count == 2 and rank == world_size - 1:
            trainer.stop.request()
        return plain(batches)  # type: ignore[arg-type]

    trainer.engine.evaluate = evaluate  # type: ignore[method-assign, assignment]
    trainer.run()
    records = read_metrics(run_dir / "metrics.jsonl")
    return count, trainer.state.step, "validation_loss" in records[-1]


def test_a_stop_ends_an_evaluation_before_its_next_batch(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stopped_in_an_evaluation(0, 1, tiny, tmp_path) == (2, 1, False)
    output = capsys.readouterr().out
    assert "the evaluation after step 1 was stopped after 2 of " in output
    assert "stopped after step 1, saved " in output
    assert (tmp_path / "checkpoints/step-00000001").is_dir()


def test_a_stop_ends_the_last_evaluation_too(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stopped_in_an_evaluation(0, 1, tiny, tmp_path, "steps=1") == (2, 1, False)
    assert f"v4 eval {tmp_path}" in capsys.readouterr().out
    assert (tmp_path / "checkpoints/step-00000001").is_dir()


@pytest.mark.parametrize("axis", ["parallel.pipeline=1", "parallel.pipeline=2"])
def test_a_stop_on_one_rank_ends_the_evaluation_on_all(
    tiny: Path, tmp_path: Path, axis: str
) -> None:
    results = spawn(stopped_in_an_evaluation, 2, tiny, tmp_path, axis)
    assert results == [(2, 1, False)] * 2


def test_v4_eval_reads_the_rows_of_the_config(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = train(tiny, tmp_path, "steps=1", "evaluation.max_rows=4")
    capsys.readouterr()
    results = []
    for rows in ("4", "8", "null"):
        assert main(["eval", str(config.run_dir), f"evaluation.max_rows={rows}"]) == 0
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    loss = read_metrics(tmp_path / "metrics.jsonl")[-1]["validation_loss"]
    assert results[0]["validation_loss"] == pytest.approx(loss, rel=1e-6)
    tokens = [result["validation_tokens"] for result in results]
    assert tokens[0] < tokens[1] < tokens[2]


def test_the_default_number_of_rows_is_bounded(tiny: Path) -> None:
    assert EvaluationConfig().max_rows == 1024
    config = load_config(tiny, ["evaluation.max_rows=1"])
    assert Validation(config, Grid.single()).steps == 1


def test_shards_that_were_prepared_again_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = tmp_path / "run", make_tiny(tmp_path)
    train(config, run, "steps=1")
    assert main(["eval", str(run)]) == 0
    assert "warning" not in capsys.readouterr().err
    lines = (tmp_path / "words.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "words.jsonl").write_text("".join(lines[:150]))
    assert main(["prepare", str(config), "--overwrite"]) == 0
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    error = capsys.readouterr().err
    assert "v4: warning: " in error and "shards has been prepared again (" in error
