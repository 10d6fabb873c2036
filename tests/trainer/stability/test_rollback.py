"""Spikes: what is one, rolling back, skipping a batch, and the end of a run that cannot."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import TokenCounts
from optim.zero import page_locked_bytes
from tests.distributed import spawn
from tests.trainer.tiny import assert_same_run, steps_in_file
from trainer.config import SpikeConfig, load_config
from trainer.engine import Messages, StepLosses
from trainer.metrics.jsonl import read_events, read_metrics
from trainer.metrics.wandb_log import WandbLog
from trainer.parallel.degrees import Degrees
from trainer.parallel.grid import Grid
from trainer.planning.static_memory import snapshot_memory
from trainer.process.errors import ConfigError, DivergedError
from trainer.report import write_report
from trainer.report.plots import CHARTS
from trainer.stability.spikes import History, SpikeDetector, severity, z_score
from trainer.state import TrainState
from trainer.to_host import to_host
from trainer.trainer import Trainer

EASY = "median_window: 2, min_history: 2, threshold: 20"
SPIKES = (
    f"stability.spikes={{{EASY}, snapshot_every: 3, min_rollback_steps: 2}}",
    "stability.anticipatory_routing.lag_steps=1",
    "stability.anticipatory_routing.active_steps=3",
)
Fault = Callable[[Trainer], None]


def test_z_score_is_that_of_numpy() -> None:
    chance = random.Random(1)
    past = [chance.gauss(3.0, 0.2) for _ in range(41)]
    deviation = 1.4826 * np.median(np.abs(past - np.median(past)))
    assert z_score(past, 4.0, 1e-9) == pytest.approx((4.0 - np.median(past)) / deviation)
    assert z_score([2.0] * 9, 2.5, 0.1) == pytest.approx(5.0)
    assert z_score(past + [1e9] * 5, 4.0, 1e-9) > 3.0, "outliers hide nothing"


def test_scores_are_those_of_numpy_from_all_the_numbers_before() -> None:
    """Of a walk, so that a median is neither the oldest of its numbers nor the newest."""
    floors = {"loss": 0.5, "grad_norm": 0.3, "router 1": 0.02}
    few = {"median_window": 5, "deviation_window": 12, "min_history": 4}
    least = {
        "min_loss_deviation": 0.5,
        "min_grad_norm_deviation": 0.3,
        "min_router_deviation": 0.02,
    }
    settings = SpikeConfig.model_validate(few | least | {"threshold": 1e9})
    chance, detector, past = random.Random(2), SpikeDetector(settings), History()
    walks: dict[str, list[float]] = {"loss": [], "grad_norm": [], "router 1": []}
    floored = 0
    for step in range(60):
        for name, walk in walks.items():
            size = 4 * floors[name] * chance.choice((0.01, 1.0))
            walk.append((walk[-1] if walk else 2.0) + chance.gauss(0.0, size))
        numbers = {name: walk[-1] for name, walk in walks.items()}
        numbers["grad_norm"] = math.exp(numbers["grad_norm"])
        actual = detector.scores(past, numbers)
        for name, walk in walks.items():
            aways = [walk[at] - np.median(walk[at - 5 : at]) for at in range(5, step + 1)]
            usual = np.array(aways[:-1][-12:])
            assert (name in actual) == (len(usual) >= 4), (name, step)
            if name in actual:
                deviation = 1.4826 * np.median(np.abs(usual - np.median(usual)))
                floored += deviation < floors[name]
                expected = (aways[-1] - np.median(usual)) / max(deviation, floors[name])
                assert actual[name] == pytest.approx(expected, rel=1e-9), (name, step)
        assert detector.problem(past, numbers | {"max_expert_share": 0.2}) is None
    assert 20 < floored < 140, "the floors count in some steps, and in some they do not"


def test_a_norm_counts_with_a_loss_and_less_without() -> None:
    for loss, norm, expected in (
        (3.0, 4.0, 5.0),
        (8.0, -1.0, 8.0),
        (1.5, 40.0, 20.0),
        (1.5, 6.0, math.hypot(1.5, 3.0)),
        (-2.0, 6.0, 3.0),
        (-2.0, -6.0, 0.0),
    ):
        assert severity({"loss": loss, "grad_norm": norm}) == pytest.approx(expected, rel=1e-12)
    assert severity({}) == 0.0


def judged(detector: SpikeDetector, past: History, **numbers: float) -> str | None:
    usual = {"loss": 3.0, "grad_norm": 0.5, "max_expert_share": 0.2, "router 0": 0.6}
    return detector.problem(past, usual | {n.replace("_0", " 0"): x for n, x in numbers.items()})


def test_what_is_a_spike() -> None:
    """Of a loss that falls by more than a deviation in the steps that it is compared with."""
    settings = SpikeConfig(deviation_window=32, min_history=8, median_window=8)
    detector, past = SpikeDetector(settings), History()
    chance = random.Random(0)
    assert judged(detector, past, loss=50.0) is None, "too early to tell"
    for step in range(80):
        calm = {"loss": chance.gauss(5.0 - 0.02 * step, 0.1), "router_0": chance.gauss(0.6, 0.01)}
        assert judged(detector, past, **calm, grad_norm=chance.lognormvariate(0, 0.2)) is None
    assert {len(past[name]) for name in ("loss", "grad_norm", "max_expert_share", "router 0")} == {
        8
    }
    assert {len(past[name]) for name in ("loss'", "grad_norm'", "router 0'")} == {32}
    before = json.dumps(past)
    assert "the loss is 4.4" in (judged(detector, past, loss=4.4) or "")
    assert "the gradient norm 30" in (judged(detector, past, grad_norm=30.0) or "")
    both = judged(detector, past, loss=3.9, grad_norm=3.5)
    assert both is not None and json.dumps(past) == before, "a spike is no part of the past"
    for alone in ({"loss": 3.9, "grad_norm": 1.0}, {"loss": 3.4, "grad_norm": 12.0}):
        assert judged(detector, json.loads(before), **alone) is None, "neither would do alone"
    assert "router of layer 0 gives 80%" in (judged(detector, past, router_0=0.8) or "")
    assert "a router collapsed: 95%" in (judged(detector, past, max_expert_share=0.95) or "")
    assert json.dumps(past) == before
    assert judged(detector, past, loss=0.1, grad_norm=0.001) is None, "less is no spike"
    crowded: History = {"max_expert_share": [0.8] * 32}
    assert judged(detector, crowded, max_expert_share=0.95) is None, "it was like this before"
    assert judged(detector, {"max_expert_share": [0.2] * 7}, max_expert_share=0.95) is None, (
        "too early to tell"
    )
    assert judged(detector, {"max_expert_share": [0.2] * 8}, max_expert_share=0.95) is not None


def run(
    tiny: Path,
    folder: Path,
    faults: dict[int, Fault],
    *settings: str,
    times: int = 1,
    grid: Grid | None = None,
) -> Trainer:
    """Train; a step's fault happens right before its update is judged, the first `times` times."""
    config = load_config(tiny, [f"run_dir={folder}", "steps=16", *settings])
    trainer = Trainer(config, grid or Grid.single())
    plain, left = trainer.engine.gradient_norm, list(faults) * times

    def gradient_norm() -> torch.Tensor:
        if (step := trainer.state.step + 1) in left:
            left.remove(step)
            faults[step](trainer)
        return plain()

    trainer.engine.gradient_norm = gradient_norm  # type: ignore[method-assign]
    trainer.run()
    return trainer


def gradients_times(factor: float) -> Fault:
    def fault(trainer: Trainer) -> None:
        for parameter in trainer.model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(factor)

    return fault


def test_rolling_back_and_skipping_a_batch(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logged: list[dict[str, Any]] = []
    monkeypatch.setattr(WandbLog, "log", lambda _, record: logged.append(record))
    trainer = run(tiny, tmp_path, {12: gradients_times(1e6)}, *SPIKES, times=2)
    assert trainer.state.step == 16 and trainer.state.rollbacks == 2
    first, event = (event for _, event in read_events(tmp_path / "metrics.jsonl"))
    assert (first["spike_step"], first["restored_step"], first["skipped_batch"]) == (12, 9, None)
    assert (event["spike_step"], event["restored_step"], event["skipped_batch"]) == (12, 9, 12)
    assert "the gradient norm" in event["reason"] and event["anticipation_end"] == 12
    lines = [line for line in capsys.readouterr().out.splitlines() if "rolled back to" in line]
    assert len(lines) == 2 and all(line.startswith("step 12: the loss is") for line in lines)
    assert ["will be skipped" in line for line in lines] == [False, True]
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 17))
    assert steps_in_file(tmp_path) == [*range(1, 12), 9, 10, 11, 9, *range(10, 17)]
    assert [r["step"] for r in records if r["loss"] is None] == [12]
    assert [r["step"] for r in records if r["anticipatory_routing"]] == [10, 11, 12]
    assert [r["rollbacks"] for r in records] == [0] * 9 + [2] * 7
    steps = [step for step in range(16) if step != 11]
    assert records[-1]["tokens"] == sum(tokens_of(trainer, step) for step in steps)
    sent = [record for record in logged if "event" in record]
    expected = [(1, first["reason"]), (2, event["reason"])]
    assert sent == [{"step": 9, "rollbacks": n, "event": what} for n, what in expected]
    page = write_report(trainer.config).read_text(encoding="utf-8")
    assert (
        "<td>rolled back to the state after step 9; batch of step 12 skipped; anticipatory routing "
        "to step 12</td>"
    ) in page
    assert "<td>rolled back to the state after step 9; anticipatory routing to step 12</td>" in page
    assert "Skipped batches: 1." in page and "(experts selected by older weights): 3." in page
    every = len(CHARTS) - 1  # but that of the indexers' objective
    assert page.count("stroke: #c24b4b; stroke-opacity: 0.7") == 2 * every, "lines in every chart"


def test_what_routers_are_judged_by(tiny: Path, tmp_path: Path) -> None:
    """The last step's loads are in the metrics; of the learned layers, 2 of 4 experts a token."""
    trainer = run(tiny, tmp_path, {}, *SPIKES, "steps=3")
    history = trainer.state.history
    assert {name for name in history if name.startswith("router")} == {
        *("router 1", "router 2", "router 3", "router 1'", "router 2'", "router 3'")
    }
    loads = read_metrics(tmp_path / "metrics.jsonl")[-1]["layers"]["expert_load_max"]
    assert history["max_expert_share"][-1] == pytest.approx(max(loads[1:]) * 2 / 4)
    assert all(0.5 <= history[f"router {layer}"][-1] < 0.7 for layer in (1, 2, 3)), "of two"
    load = torch.tensor([[16.0, 0, 0, 0], [6, 4, 4, 2], [4, 4, 4, 4], [4, 4, 4, 4]])
    sums, none = torch.zeros(5).double().unbind(0), TokenCounts(1, 1, 1)
    losses = StepLosses(*sums, load, torch.zeros(4), none, 0.0, Messages())
    metrics = to_host(trainer.config.model, losses, torch.ones(()), 1e-3, 0)
    assert metrics.max_expert_share == 6 / 8, "not the hash layer's"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_is_left_of_what_came_after_a_snapshot(tiny: Path, precision: str) -> None:
    config = load_config(tiny, [*SPIKES, f"precision={precision}"])
    trainer = Trainer(config, Grid.single())
    optimizer, snapshots = trainer.optimizer, trainer.stability.snapshots
    weights = trainer.model.state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    states = [piece.tensor.clone() for piece in optimizer.states()]
    snapshots.before_step(TrainState(step=3))
    for tensor in (*weights.values(), *(piece.tensor for piece in optimizer.states())):
        tensor.detach().add_(1)
    optimizer.step_count = 7
    assert snapshots.restore(TrainState(step=8)) and optimizer.step_count == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in weights.items())
    pairs = zip(states, optimizer.states(), strict=True)
    assert all(torch.equal(old, piece.tensor) for old, piece in pairs)


def test_what_was_learned_from_spikes_stays(tiny: Path, tmp_path: Path) -> None:
    """The second spike goes back to the snapshot from before the first, which knows nothing."""
    faults = {12: gradients_times(1e6), 13: gradients_times(1e6)}
    trainer = run(tiny, tmp_path, faults, *SPIKES, times=2)
    events = [event for _, event in read_events(tmp_path / "metrics.jsonl")]
    assert [event["spike_step"] for event in events] == [12, 12, 13, 13]
    assert {event["restored_step"] for event in events} == {9}
    assert (trainer.state.rollbacks, trainer.state.skipped_batches) == (4, [11, 12])
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if record["loss"] is None] == [12, 13]


def test_a_batch_stays_where_none_may_be_skipped(tiny: Path, tmp_path: Path) -> None:
    spikes = (*SPIKES, "stability.spikes.skip_bad_batches=false")
    trainer = run(tiny, tmp_path, {12: gradients_times(1e6)}, *spikes, times=3)
    assert (trainer.state.rollbacks, trainer.state.skipped_batches) == (3, [])
    assert all(record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl"))


def tokens_of(trainer: Trainer, step: int) -> int:
    return sum(sum(row) for batch in trainer.loader.at(step) for row in batch.lengths)


def test_a_restored_state_is_that_of_the_snapshot(tiny: Path, tmp_path: Path) -> None:
    """A fault that comes once costs nothing: not routed otherwise, the run is the undisturbed."""
    calm = ("stability.anticipatory_routing.when=never", "checkpoint.every=4")
    turn = (f"stability.spikes={{{EASY}, snapshot_every: 3}}",)
    run(tiny, tmp_path / "plain", {}, *calm)
    faults = {10: gradients_times(1e6), 14: gradients_times(1e6)}
    trainer = run(tiny, tmp_path / "rolled", faults, *calm, *turn)
    assert trainer.state.rollbacks == 2
    events = [event for _, event in read_events(tmp_path / "rolled/metrics.jsonl")]
    assert [event["restored_step"] for event in events] == [3, 6], "five steps or more, and no more"
    assert_same_run(tmp_path / "plain", tmp_path / "rolled", 16)
    assert_same_run(tmp_path / "plain", tmp_path / "rolled", 12)


def test_checkpoints_are_restored_and_later_ones_removed(tiny: Path, tmp_path: Path) -> None:
    """No snapshots; the checkpoint of step 10 is of steps that are undone."""
    turn = f"stability.spikes={{{EASY}, snapshot_every: 0, min_rollback_steps: 3}}"
    never = "stability.anticipatory_routing.when=never"
    run(tiny, tmp_path / "plain", {}, "checkpoint.every=5")
    settings = (turn, never, "checkpoint.every=5", "checkpoint.keep=0")
    folders: list[list[str]] = []

    def fault(trainer: Trainer) -> None:
        gradients_times(1e6)(trainer)
        plain = trainer.stability.roll_back

        def roll_back(problem: str) -> object:
            result = plain(problem)
            folders.append(sorted(p.name for p in (tmp_path / "rolled/checkpoints").iterdir()))
            return result

        trainer.stability.roll_back = roll_back  # type: ignore[method-assign, assignment]

    run(tiny, tmp_path / "rolled", {12: fault}, *settings)
    assert folders == [["step-00000005"]]
    assert_same_run(tmp_path / "plain", tmp_path / "rolled", 16)


def test_the_run_ends_with_a_checkpoint_where_it_cannot_roll_back(
    tiny: Path, tmp_path: Path
) -> None:
    bare = f"stability.spikes={{{EASY}, snapshot_every: 0}}"
    with pytest.raises(
        DivergedError, match=r"step 8: .*neither a snapshot nor a checkpoint.*saved"
    ):
        run(tiny, tmp_path / "bare", {8: gradients_times(1e6)}, bare)
    assert read_events(tmp_path / "bare/metrics.jsonl")[0][1]["stop_reason"]
    run(tiny, tmp_path / "bare", {}, bare)
    run(tiny, tmp_path / "plain", {})
    assert_same_run(tmp_path / "plain", tmp_path / "bare", 16)

    # The second spike comes while experts are chosen ahead, and so does the checkpoint.
    longer = ("stability.anticipatory_routing.active_steps=9", "checkpoint.every=5")
    spent = (*SPIKES, "stability.spikes.max_rollbacks=1", *longer)
    with pytest.raises(DivergedError, match=r"max_rollbacks = 1 times already; saved .*step-0+9$"):
        run(tiny, tmp_path / "spent", {n: gradients_times(1e6) for n in (8, 12)}, *spent)
    names = sorted(path.name for path in (tmp_path / "spent/checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000005", "step-00000009"]
    state = json.loads((tmp_path / "spent/checkpoints/step-00000009/state.json").read_text())
    assert (state["rollbacks"], state["spike_steps"], state["skipped_batches"]) == (1, [7], [])
    assert {"loss", "loss'", "grad_norm'", "max_expert_share", "router 2'"} < state[
        "history"
    ].keys()
    assert state["anticipation_start"] == 9, "what waited for the undone steps is gone"
    assert run(tiny, tmp_path / "spent", {}, *spent).state.step == 16

    ahead = (bare, "stability.anticipatory_routing={when: always, lag_steps: 1}")
    with pytest.raises(DivergedError, match="neither a snapshot"):
        run(tiny, tmp_path / "ahead", {8: gradients_times(1e6)}, *ahead)
    assert run(tiny, tmp_path / "ahead", {}, *ahead).state.step == 16


def test_numbers_that_are_not_finite_roll_back_after_the_skipped_steps(
    tiny: Path, tmp_path: Path
) -> None:
    faults = {n: gradients_times(float("nan")) for n in (8, 9, 10)}
    trainer = run(tiny, tmp_path, faults, *SPIKES, "optim.max_skipped_steps=2")
    assert trainer.state.rollbacks == 1 and trainer.state.skipped_steps == 0
    (event,) = [event for _, event in read_events(tmp_path / "metrics.jsonl")]
    assert (
        event["restored_step"] == 6 and "more than optim.max_skipped_steps = 2" in event["reason"]
    )


def held_by(tiny: Path, grid: Grid, *settings: str) -> tuple[int, int]:
    """The peak bytes of snapshots on this rank, as they are and as torch would lock them."""
    config = load_config(tiny, [*SPIKES, *settings])
    snapshots = Trainer(config, grid).stability.snapshots
    peak = peak_locked = 0
    for step in range(1, 20):
        snapshots.before_step(TrainState(step=step))
        sizes = [tensor.nbytes for each in snapshots._snapshots for tensor in each.tensors]
        peak, peak_locked = max(peak, sum(sizes)), max(peak_locked, sum(map(locked, sizes)))
    return peak, peak_locked


def locked(size: int) -> int:
    """Rounded up to a power of two, and to a page."""
    return max(4096, 2 ** math.ceil(math.log2(size)))


def counted_for(tiny: Path, degrees: Degrees, *settings: str) -> tuple[int, int]:
    config = load_config(tiny, [*SPIKES, *settings])
    return snapshot_memory(config, degrees), snapshot_memory(config, degrees, page_locked=True)


ROOM = [
    ("precision=bf16", "stability.spikes.min_rollback_steps=1"),
    ("stability.spikes.min_rollback_steps=3",),
    ("stability.spikes.min_rollback_steps=7", "precision=bf16"),
]


def test_memory_of_snapshots_is_what_is_held(tiny: Path) -> None:
    """To the byte, also where torch rounds it up for a GPU: by up to twice."""
    for settings in ROOM:
        plain, rounded = counted_for(tiny, Degrees(1), *settings)
        assert held_by(tiny, Grid.single(), *settings) == (plain, rounded), settings
        assert 0 < plain < rounded
    for off in (["stability.spikes=null"], [*SPIKES, "stability.spikes.snapshot_every=0"]):
        assert snapshot_memory(load_config(tiny, off), Degrees(1)) == 0
    assert [page_locked_bytes(n) for n in (4, 4096, 4097, 2**30 + 1)] == [4096, 4096, 8192, 2**31]


Two = tuple[int, list[int], list[tuple[int, int]]]


def two_ranks(rank: int, world_size: int, tiny: Path, folder: Path) -> Two:
    grid = Grid.build(load_config(tiny, ["parallel.pipeline=2"]).degrees(2), torch.device("cpu"))
    fault = {12: gradients_times(1e6)}
    trainer = run(tiny, folder, fault, *SPIKES, "parallel.pipeline=2", times=2, grid=grid)
    data = Grid.build(load_config(tiny).degrees(2), torch.device("cpu"))
    held = [held_by(tiny, data, *settings) for settings in ROOM]
    return trainer.state.rollbacks, trainer.state.skipped_batches, held


def test_two_ranks_roll_back_together_and_as_one_does(tiny: Path, tmp_path: Path) -> None:
    results = spawn(two_ranks, 2, tiny, tmp_path / "two")
    assert [each[:2] for each in results] == [(2, [11]), (2, [11])]
    expected = [counted_for(tiny, Degrees(2), *more) for more in ROOM]
    fullest = [tuple(map(max, *held)) for held in zip(*(each[2] for each in results), strict=True)]
    assert fullest == expected
    run(tiny, tmp_path / "one", {12: gradients_times(1e6)}, *SPIKES, times=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def losses(run_dir: Path) -> dict[int, float]:
    records = read_metrics(run_dir / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records if record["loss"]}


def asked_to_stop(coming: Iterator[bool]) -> Fault:
    return lambda trainer: next(coming) and trainer.stop.request()


@pytest.mark.parametrize(
    ("source", "parts"), [("snapshot", [[False, True]]), ("checkpoint", [[True], [True]])]
)
def test_a_rolled_back_run_resumes_as_if_it_had_not_been_stopped(
    tiny: Path, tmp_path: Path, source: str, parts: list[list[bool]]
) -> None:
    """Stopped while it routes by older weights, and before the batch that is skipped.

    All ranks have agreed to stop after the step that is a spike. In parts: where step 11 comes. A
    run that resumes and rolls back has only checkpoints, from before where it began.
    """
    longer = (*SPIKES, "stability.anticipatory_routing.active_steps=5")
    if source == "checkpoint":
        longer += ("stability.spikes.snapshot_every=0", "checkpoint.every=3")
    spike: dict[int, Fault] = {12: gradients_times(1e6)}
    run(tiny, tmp_path / "straight", spike, *longer, times=2)

    for stops in parts:
        cut = {11: asked_to_stop(iter(stops))}
        state = run(tiny, tmp_path / "parts", cut | spike, *longer, times=len(stops)).state
        assert state.step == 10 and state.spike_steps == [11]
    assert (state.rollbacks, state.skipped_batches) == (2, [11])
    run(tiny, tmp_path / "parts", {}, *longer)
    assert losses(tmp_path / "parts") == losses(tmp_path / "straight")
    assert len(read_events(tmp_path / "parts/metrics.jsonl")) == 2


def test_settings_that_do_not_go_together(tiny: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"min_history = 9 should be at most .*deviation_window = 8"
    ):
        load_config(tiny, ["stability.spikes={deviation_window: 8, min_history: 9}"])
    with pytest.raises(ConfigError, match=r"stability.spikes is not supported with engine"):
        load_config(
            tiny,
            [
                "engine=deepspeed",
                "deepspeed={optimizer: {type: AdamW}}",
                "optim.matrix_optimizer=adamw",
                "optim.max_skipped_steps=0",
                "stability.spikes={}",
            ],
        )
