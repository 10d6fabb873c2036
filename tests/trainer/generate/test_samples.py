"""Prompts that a run continues at its evaluations, on any ranks; training is as without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import spawn
from tests.trainer.tiny import train
from trainer.commands import main
from trainer.config import ConfigError, RunConfig, load_config
from trainer.generate import Generation
from trainer.metrics import read_metrics
from trainer.parallel.grid import Grid
from trainer.report import write_report
from trainer.trainer import Trainer

PROMPTS = [
    "evaluation.every=1",
    "evaluation.prompts=[the cat, a <b>]",
    "evaluation.prompt_tokens=6",
]
GREEDY = ["--max-new-tokens=6", "--temperature=0", "--json"]
STEPS = ["steps=2", "checkpoint.every=0"]


def samples_of(config: RunConfig) -> list[dict[str, str]]:
    return [record["samples"] for record in read_metrics(config.run_dir / "metrics.jsonl")]


def losses_of(config: RunConfig) -> list[Any]:
    records = read_metrics(config.run_dir / "metrics.jsonl")
    return [(record["loss"], record["grad_norm"]) for record in records]


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return train(tiny, tmp_path_factory.mktemp("samples") / "run", *STEPS, *PROMPTS)


def test_prompts_are_continued_after_each_evaluation(
    run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the end of the run the text is that of its checkpoint."""
    capsys.readouterr()
    first, second = samples_of(run)
    assert list(first) == list(second) == ["the cat", "a <b>"]
    main(["generate", str(run.run_dir), "--prompt=the cat", *GREEDY])
    assert json.loads(capsys.readouterr().out)["text"] == second["the cat"]


def test_they_change_nothing_of_the_training(run: RunConfig, tiny: Path, tmp_path: Path) -> None:
    without = train(tiny, tmp_path / "run", *STEPS, "evaluation.every=1")
    assert losses_of(without) == losses_of(run)


def test_the_report_has_them_over_time(run: RunConfig) -> None:
    page = write_report(run).read_text()
    assert "Continuations of <code>a &lt;b&gt;</code>" in page
    assert page.count("class=sample") == 4


def test_a_stop_is_answered_between_tokens(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A checkpoint of the step is saved, as where a stop ends the validation."""
    config = load_config(tiny, [f"run_dir={tmp_path / 'run'}", "steps=2", *PROMPTS])
    trainer = Trainer(config, Grid.single())

    step, rounds = Generation._speculative_step, 0

    def stopped_in_the_second_round(generation: Generation, active: Any) -> Any:
        nonlocal rounds
        rounds += 1
        if rounds == 2:
            trainer.stop.request()
        return step(generation, active)

    monkeypatch.setattr(Generation, "_speculative_step", stopped_in_the_second_round)
    assert trainer.run().step == 1 and rounds == 2
    output = capsys.readouterr()
    text = output.out + output.err
    assert (
        "was stopped while it continued prompts" in text and "stopped after step 1, saved" in text
    )


def test_prompts_that_do_not_fit_the_model_stop_the_start(tiny: Path, tmp_path: Path) -> None:
    long = ["evaluation.prompts=[a, b]", "evaluation.prompt_tokens=4095"]
    with pytest.raises(ConfigError, match=r"evaluation\.prompts\.0 has 2 tokens, and with"):
        train(tiny, tmp_path / "run", *long)


def train_on_rank(rank: int, world_size: int, path: Path, folder: Path) -> None:
    train(path, folder, *STEPS, *PROMPTS, "parallel.tensor=2", "parallel.expert=2")


@pytest.mark.slow
def test_ranks_continue_alike(run: RunConfig, tiny: Path, tmp_path: Path) -> None:
    spawn(train_on_rank, 2, tiny, tmp_path / "run")
    config = load_config(tiny, [f"run_dir={tmp_path / 'run'}"])
    assert samples_of(config) == samples_of(run)


def test_what_cannot_continue_prompts(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompts need parallel\.pipeline = 1, and it is 2"):
        load_config(tiny, [*PROMPTS, "parallel.pipeline=2"])
    with pytest.raises(ConfigError, match="prompts are not supported with engine = deepspeed"):
        load_config(tiny, [*PROMPTS, "engine=deepspeed"])
    with pytest.raises(ConfigError, match="prompts"):
        load_config(tiny, ["evaluation.prompts=['']"])
