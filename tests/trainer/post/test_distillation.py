"""Runs that learn from teachers on their own samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.post.reinforce import distillation, reinforcement
from tests.trainer.tiny import assert_same_run, column, train
from trainer.config import load_config
from trainer.generate import open_model
from trainer.post.teachers import Teachers
from trainer.process.errors import CheckpointError, PostTrainingError

STILL = ["optim.learning_rate=1e-30", "router_bias_speed=0", "steps=1"]


@pytest.fixture(scope="module")
def teachers(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two runs of different seeds, the first with the weights that the tiny run begins with."""
    folder = tmp_path_factory.mktemp("teachers")
    train(tiny, folder / "still", *STILL)
    train(tiny, folder / "other", "seed=5", "steps=2")
    return [str(folder / "still"), str(folder / "other")]


@pytest.fixture(scope="module")
def straight(tiny: Path, teachers: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    overrides = distillation(folder, teachers, steps_per_rollout=2)
    return train(tiny, folder / "run", "steps=4", "checkpoint.every=1", *overrides).run_dir


def logits_of(folder: str, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = open_model(folder).model(torch.tensor([tokens])).logits
    return logits[0].double()


def test_the_loss_is_the_mean_kl_over_the_vocabulary(straight: Path, teachers: list[str]) -> None:
    """Of the first step, whose student is the first teacher: only the other domain counts."""
    lines = (straight / "rollouts" / "step-00000000.jsonl").read_text().splitlines()
    total, tokens = 0.0, 0
    for sample in map(json.loads, lines):
        text = [*sample["prompt_ids"], *sample["ids"]][:-1]
        answer = slice(len(sample["prompt_ids"]) - 1, None)
        teacher = teachers[int(sample["domain"][-1])]
        student = logits_of(teachers[0], text)[answer].log_softmax(-1)
        of_teacher = logits_of(teacher, text)[answer].log_softmax(-1)
        kl = (student.exp() * (student - of_teacher)).sum(-1)
        assert (kl.max() < 1e-6) == (sample["domain"] == "domain0")
        total, tokens = total + float(kl.sum()), tokens + len(kl)
    post = column(straight, "post")[0]
    assert post["kl"] == pytest.approx(total / tokens, rel=1e-5)
    assert column(straight, "lm_loss")[0] == pytest.approx(post["kl"], rel=1e-6)
    assert post["log_p_gap_max"] < 1e-4 and post["seconds/score"] > 0


def test_the_student_comes_closer(tiny: Path, teachers: list[str], tmp_path: Path) -> None:
    overrides = distillation(tmp_path, teachers[1:], steps_per_rollout=6)
    run = train(tiny, tmp_path / "run", "steps=6", *overrides).run_dir
    kl = [post["kl"] for post in column(run, "post")]
    assert kl[-1] < 0.7 * kl[0]


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("read", [1, 2])
def test_a_run_that_dies_between_teachers_resumes_to_the_same_bits(
    straight: Path,
    tiny: Path,
    teachers: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    read: int,
) -> None:
    """Step 3 trains on the rollout of step 2, and its samples are scored again."""
    overrides = distillation(tmp_path, teachers, steps_per_rollout=2)
    overrides += ["steps=4", "checkpoint.every=1"]
    score, count = Teachers.read, [0]

    def dies(*arguments: Any) -> Any:
        result = score(*arguments)
        count[0] += 1
        if count[0] == (2 + read if step == 2 else read):
            raise RuntimeError("killed")
        return result

    if step == 3:
        with pytest.raises(RuntimeError, match="crash"):
            train(tiny, tmp_path / "run", *overrides, crash_at=4)
    with monkeypatch.context() as patched:
        patched.setattr(Teachers, "read", dies)
        with pytest.raises(RuntimeError, match="killed"):
            train(tiny, tmp_path / "run", *overrides)
    train(tiny, tmp_path / "run", *overrides)
    assert_same_run(straight, tmp_path / "run", 4)


def test_the_reference_of_the_kl(tiny: Path, teachers: list[str], tmp_path: Path) -> None:
    """The KL is 0 while the weights are those of the reference, and then is not."""
    more: dict[str, Any] = {"policy": {"kl_weight": 0.1}, "reference": teachers[0]}
    overrides = reinforcement(tmp_path, steps_per_rollout=2, **more)
    run = train(tiny, tmp_path / "run", "steps=2", *overrides).run_dir
    first, second = column(run, "post")
    assert abs(first["kl"]) < 1e-9 < 1e-6 < second["kl"]


def test_teachers_that_do_not_fit(tiny: Path, teachers: list[str], tmp_path: Path) -> None:
    larger = train(tiny, tmp_path / "larger", "steps=1", "model.vocab_size=404").run_dir
    with pytest.raises(PostTrainingError, match="has a vocabulary of 404, and the model that"):
        train(tiny, tmp_path / "run", *distillation(tmp_path, [str(larger)]))
    untrained = tmp_path / "untrained"
    untrained.mkdir()
    text = load_config(tiny, [f"run_dir={untrained}"]).to_yaml()
    (untrained / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        train(tiny, tmp_path / "run", *distillation(tmp_path, [str(untrained)]))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
