"""lm-eval through our model and through its own backend of transformers, item by item."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.evaluation.tasks import write_tasks
from tests.trainer.tiny import train
from trainer.commands import main
from trainer.config import EvaluationConfig
from trainer.engine import NativeEngine
from trainer.evaluation import SharedModel, Tasks
from trainer.evaluation.scoring import RowSizes
from trainer.export import open_run
from trainer.parallel.grid import Grid
from trainer.run_tokenizer import open_tokenizer

pytestmark = pytest.mark.slow
Samples = dict[str, list[dict[str, Any]]]
LENGTH = 256
"""Tokens that the model reads; one question is longer."""
RTOL = 2e-5
"""Of log-likelihoods in fp32, which sum up to 256 terms."""


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    # No indexer has to choose: scores of 0, which tie, are common in such a small model.
    sizes = [f"model.max_position_embeddings={LENGTH}", f"model.index_topk={LENGTH // 4}"]
    settings = ["steps=12", "optim.learning_rate=1e-2", *sizes]
    train(tiny, folder / "run", *settings)
    assert main(["export", str(folder / "run"), str(folder / "hf")]) == 0
    return folder


def samples_of_hf(folder: Path, tasks: Tasks) -> Samples:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    assert model.max_length == LENGTH
    result = evaluate(model, tasks._opened, bootstrap_iters=0, log_samples=True)
    assert result is not None
    return dict(result["samples"])


def test_numbers_are_those_of_its_own_backend_on_the_export(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from trainer.config import load_run

    files = write_tasks(tmp_path)
    settings = EvaluationConfig(tasks=tuple(map(str, files.values())))
    config, grid = load_run(run / "run"), Grid.single()
    local, _ = open_run(config, grid)
    tasks = Tasks(settings, grid)
    sizes = RowSizes(config.data.seq_len, 2)
    model = SharedModel(NativeEngine(local, grid), open_tokenizer(config), "select", sizes)
    capfd.readouterr()
    scores = tasks.evaluate(model)
    ours = tasks.samples
    assert not capfd.readouterr().err  # lm-eval draws bars by itself
    theirs = samples_of_hf(run / "hf", Tasks(settings, grid))

    assert ours.keys() == theirs.keys() == {"choice", "rolling", "until"}
    greedy = set()
    for task in ours:
        assert len(ours[task]) == len(theirs[task]) == 12
        for one, other in zip(ours[task], theirs[task], strict=True):
            assert one["arguments"] == other["arguments"]
            for (mine,), (reference,) in zip(one["resps"], other["resps"], strict=True):
                if task == "until":
                    assert mine == reference
                elif task == "rolling":
                    assert mine == pytest.approx(reference, rel=RTOL)
                else:
                    assert mine[0] == pytest.approx(reference[0], rel=RTOL)
                    assert mine[1] == reference[1]
                    greedy.add(mine[1])
            assert one["filtered_resps"][0] is not None
            if "acc" in one:
                assert one["acc"] == other["acc"]
    texts = [sample["resps"][0][0] for sample in ours["until"]]
    assert len({*texts}) > 3 and any(len(text) > 20 for text in texts)
    assert scores["choice/acc"] == sum(s["acc"] for s in ours["choice"]) / 12
    assert 0 < scores["choice/acc_stderr"] < 0.2


def test_v4_eval_gives_the_same_scores_of_a_run_and_of_its_export(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_tasks(tmp_path)
    tasks = f"--tasks={files['choice']},{files['until']}"
    results = []
    for folder in ("run", "hf"):
        capsys.readouterr()
        assert main(["eval", str(run / folder), tasks, "--limit=5", "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["step"] == 12
    assert results[0]["tasks"] == results[1]["tasks"]
    assert results[0]["tasks"].keys() >= {"choice/acc", "choice/acc_stderr", "until/exact_match"}
    assert main(["eval", str(run / "hf"), tasks, "--limit=5"]) == 0
    assert "acc" in capsys.readouterr().out
