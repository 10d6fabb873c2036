"""A run through phases: what each of them trains, and resumes inside them and at their borders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.config.test_recipe import phased
from tests.trainer.parallel.topologies import Job, differences, outcome, run_all, topology
from tests.trainer.tiny import assert_same_run, column, saved_tensors, steps_in_file, train
from trainer.config import ConfigError, load_config
from trainer.metrics.jsonl import read_metrics
from trainer.planning.dry_run import count_memory
from trainer.planning.plan import describe_plan, recipe_part
from trainer.report import write_report

# Steps 0-2, 3-4, 5-7, 8-9 and 10-12: a ramp, four row lengths, three kinds of attention, decay.
STAGES: list[dict[str, Any]] = [
    {
        "until_tokens": 640,
        "attention": "dense",
        "seq_len": 64,
        "initial_batch_size": 2,
        "rampup_tokens": 256,
    }
    | {"micro_batch_size": 1},
    {
        "until_tokens": 1020,
        "attention": "dense",
        "seq_len": 96,
        "global_batch_size": 2,
        "micro_batch_size": 1,
    },
    {
        "until_tokens": 1690,
        "attention": "warmup",
        "seq_len": 112,
        "global_batch_size": 2,
        "micro_batch_size": 1,
    },
    {
        "until_tokens": 2140,
        "attention": "sparse",
        "seq_len": 112,
        "global_batch_size": 2,
        "micro_batch_size": 1,
    },
    {
        "until_tokens": 2900,
        "attention": "sparse",
        "seq_len": 128,
        "global_batch_size": 2,
        "micro_batch_size": 1,
    }
    | {"decay": True, "router_bias_speed": 0.01},
]
BORDERS = [3, 5, 8, 10]
STEPS = 13
COMMON = (
    *("metrics.layer_stats_every=0", "evaluation.every=4", "evaluation.max_rows=4"),
    *(
        "data.global_batch_size=4",
        "stability.spikes={}",
        "stability.anticipatory_routing.lag_steps=2",
    ),
)


@pytest.fixture(scope="module")
def path(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phased(tiny, tmp_path_factory.mktemp("phases"), STAGES)


@pytest.fixture(scope="module")
def straight(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run from the first step to the last, saved after every other step."""
    run = tmp_path_factory.mktemp("straight") / "run"
    train(path, run, *COMMON, "checkpoint.every=2", "checkpoint.keep=0")
    return run


def test_the_phases_are_as_they_look(path: Path) -> None:
    recipe = load_config(path).recipe
    assert [phase.first for phase in recipe.phases[1:]] == BORDERS and recipe.steps == STEPS


@pytest.mark.parametrize("ends", [BORDERS, [2, 4, 7, 9, 12]], ids=["borders", "inside"])
def test_stopped_and_killed(
    path: Path,
    straight: Path,
    tmp_path: Path,
    ends: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped at every border or inside of every phase; killed on the way to the last stop.

    The latter refuses whatever may differ from run to run, which changes no bit on a CPU.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(ends != BORDERS)
    try:
        interrupted(path, tmp_path / "run", ends)
    finally:
        torch.use_deterministic_algorithms(False)
    assert steps_in_file(tmp_path / "run") == list(range(1, STEPS + 1))
    assert_same_run(straight, tmp_path / "run", STEPS)
    assert column(straight, "indexer_loss") == column(tmp_path / "run", "indexer_loss")


def interrupted(path: Path, run: Path, ends: list[int]) -> None:
    for end in ends:
        if end == ends[-1]:
            with pytest.raises(RuntimeError, match="crash"):
                train(path, run, *COMMON, crash_at=end - 1)
        train(path, run, *COMMON, stop_at=end)
        assert (run / f"checkpoints/step-{end:08d}").is_dir()
    train(path, run, *COMMON)


def test_what_a_phase_trains(straight: Path) -> None:
    """Weights and the optimizer's state of what is frozen stay as they are, bit for bit."""
    at = {n: saved_tensors(straight / f"checkpoints/step-{n:08d}") for n in (2, 4, 6, 8, 10)}

    def changed(first: int, last: int) -> tuple[set[str], set[str]]:
        names = {n for n, old in at[first].items() if not torch.equal(old, at[last][n])}
        return {n for n in names if ".indexer." in n}, {n for n in names if ".indexer." not in n}

    indexers = {n for n in at[2] if ".indexer." in n}
    others = at[2].keys() - indexers
    assert len(indexers) == 16  # of six parameters: weights, momenta or averages, counts
    dense, rest = changed(2, 4)
    assert not dense and len(rest) > 0.9 * len(others)
    warmup, rest = changed(6, 8)
    assert warmup == indexers and not rest
    sparse, rest = changed(8, 10)
    assert sparse == indexers and len(rest) > 0.9 * len(others)


def test_what_a_phase_begins_with_is_compared_with_nothing(straight: Path, path: Path) -> None:
    recipe = load_config(path).recipe
    for step in range(2, STEPS, 2):
        state = json.loads((straight / f"checkpoints/step-{step:08d}/state.json").read_text())
        assert len(state["history"]["loss"]) == step - recipe.at(step - 1).first, step


def test_updates_are_as_large_as_the_rate_says(straight: Path, path: Path) -> None:
    """Muon's: 0.18 of the learning rate (report §2.4), and a tenth of the weights as decay."""
    rate = load_config(path).recipe.learning_rate(STEPS - 1)
    (groups,) = [record["groups"] for record in records_of(straight) if "groups" in record]
    for group in ("experts", "attention"):
        assert groups["update_rms"][group] == pytest.approx(0.18 * rate, rel=0.05), group


def records_of(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / "metrics.jsonl")


def test_what_the_metrics_say(straight: Path, path: Path) -> None:
    recipe = load_config(path).recipe
    assert column(straight, "phase") == [recipe.at(step).number for step in range(STEPS)]
    assert column(straight, "learning_rate") == [recipe.learning_rate(s) for s in range(STEPS)]
    before = 0
    for step, tokens in enumerate(column(straight, "tokens")):
        phase = recipe.at(step)
        rows = phase.rows.rows_before(step - phase.first + 1)
        rows -= phase.rows.rows_before(step - phase.first)
        assert 0.8 < (tokens - before) / (rows * phase.rows.seq_len) <= 1.0, step
        before = tokens
    objective = column(straight, "indexer_loss")
    assert objective[:5] == [0.0] * 5 and all(value > 0 for value in objective[5:])
    assert objective[7] < objective[5], "the warm-up taught nothing"
    names = ("loss", "lm_loss", "mtp_loss", "balance_loss")
    parts = zip(*(column(straight, name) for name in names), strict=True)
    for step, (loss, lm, mtp, balance) in enumerate(parts):
        weight = recipe.mtp_loss_weight(step)
        assert loss == pytest.approx(lm + weight * mtp + balance + objective[step], rel=1e-7)


def test_a_choice_of_more_than_all_is_said_once(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(path, tmp_path / "run", *COMMON, "model.index_topk=40", stop_at=2)
    assert capsys.readouterr().out.count("sparse attention selects all of them") == 1


def test_the_report_and_the_plan_show_the_phases(straight: Path, path: Path) -> None:
    config = load_config(path, [f"run_dir={straight}"])
    html = write_report(config).read_text(encoding="utf-8")
    for phase in config.recipe.phases:
        assert f">{phase.name}</text>" in html
    assert 'aria-label="Indexer loss"' in html
    parts = list(recipe_part(config, 1))
    assert "the median of the run's last steps" in str(parts[1])


def test_memory_is_that_of_the_largest_microbatches(path: Path) -> None:
    config = load_config(path)
    found = [count_memory(config, 1, phase=phase) for phase in (None, 0, 3)]
    assert [dry.phase.number for dry in found] == [4, 0, 3]
    longest, dense, shorter = (dry.fullest.activations for dry in found)
    assert longest > shorter > dense
    assert shorter / longest == pytest.approx(112 / 128, rel=0.05)
    with pytest.raises(ConfigError, match="phase 7 should be one of the run's, 0 to 4"):
        list(describe_plan(config, 1, dry=True, phase=7))


TOPOLOGIES = [
    topology(2, pipeline=2),
    topology(2, tensor=2),
]


@pytest.mark.slow
def test_other_topologies_train_the_same_and_resume_across_borders(
    path: Path, tmp_path: Path
) -> None:
    """Losses of all steps, and from one topology to another in the middle of the warm-up."""
    alone = Job(topology(1), tmp_path / "alone")
    jobs = [alone, *(Job(spread, tmp_path / spread.name) for spread in TOPOLOGIES)]
    moves = [Job(topology(2, context=2), tmp_path / "move", 6), Job(topology(1), tmp_path / "move")]
    # With this seed no choice of another phase's is close either: see close_calls.py.
    more = (*COMMON, "model.index_topk=3", "steps=0", "data.micro_batch_size=1", "seed=40")
    run_all(path, jobs[1:] + moves[:1], *more)
    run_all(path, [alone, moves[1]], *more)
    reference = outcome(alone.run_dir)
    for job in jobs[1:]:
        loss, weight, name = differences(reference, outcome(job.run_dir))
        assert loss < 1e-5 and weight < 1e-4, (job.topology.name, loss, weight, name)
    moved, straight = (column(tmp_path / n, "loss") for n in ("move", "alone"))
    assert moved == pytest.approx(straight, rel=1e-5)
