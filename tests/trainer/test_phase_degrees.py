"""A run on four processes whose degrees change from phase to phase, and the same run on one set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import spawn
from tests.trainer.config.test_recipe import phased
from tests.trainer.parallel.topologies import MODEL
from tests.trainer.test_phase_runs import COMMON, STAGES, STEPS
from tests.trainer.tiny import assert_same_run, column, crash, steps_in_file, train
from trainer.__main__ import main
from trainer.checkpoint import checkpoints_in, step_of
from trainer.checkpoint.rank_files import NewCheckpoint
from trainer.config import load_config
from trainer.parallel.grid import Grid
from trainer.process.signals import StopRequest
from trainer.step import StepResult
from trainer.trainer import Trainer

# A pipeline on one side of two borders; at all of them other ranks own the optimizer's states.
DEGREES: list[dict[str, Any]] = [
    {"tensor": 2, "expert": 2},
    {"context": 2, "recompute": ["block"]},
    {"tensor": 2, "pipeline": 2},
    {"tensor": 2, "expert": 4},
    {"context": 4, "expert_tensor": 2},
]
RUN = (
    *(*MODEL, *COMMON, "steps=0", "data.micro_batch_size=1", "model.index_topk=3", "seed=40"),
    *("checkpoint.every=2", "checkpoint.keep=0"),
)
Point = tuple[str, int]
"""How processes end at a step: killed `before` its save, `in` it or `after` it; asked to `stop` by
a signal in that step, or by one `late`, during the save."""
# At every border, and where nothing else is between two of them.
DEATHS: list[Point] = [
    *(("before", 3), ("in", 3), ("after", 3), ("in", 5), ("stop", 5)),
    *(("before", 8), ("late", 8), ("before", 10), ("in", 10), ("after", 10)),
]


def with_degrees(tiny: Path, folder: Path) -> Path:
    stages = [stage | {"parallel": own} for stage, own in zip(STAGES, DEGREES, strict=True)]
    return phased(tiny, folder, stages)


def train_on(
    rank: int,
    world: int,
    path: Path,
    run_dir: Path,
    more: tuple[str, ...],
    deaths: list[Point],
    spike: int | None = None,
) -> list[int]:
    """Worker: trains to the end, as processes that are started again; returns where each began.

    They end once at every point of `deaths`, in their order. `spike` is a step that is one the
    first time.
    """
    deaths, begins = list(deaths), []
    while True:
        config = load_config(path, [*RUN, *more, f"run_dir={run_dir}"])
        saved = checkpoints_in(run_dir / "checkpoints")
        config = config.at_step(step_of(saved[-1]) if saved else 0)
        stop = StopRequest()
        trainer = Trainer(config, Grid.build(config.degrees(world), torch.device("cpu")), stop)
        if deaths:
            end_at(trainer, stop, *deaths[0])
        if spike is not None:
            plant(trainer, spike)
        dist.barrier()
        begins.append(config.segment.number)
        try:
            state = trainer.run()
        except RuntimeError as error:
            assert "crash" in str(error)
            deaths.pop(0)
            continue
        if deaths and deaths[0] in [(how, state.step) for how in ("after", "stop", "late")]:
            assert state.starts_again == (deaths.pop(0)[0] == "after")
        elif not state.starts_again:
            assert not deaths
            return begins


def end_at(trainer: Trainer, stop: StopRequest, how: str, step: int) -> None:
    if how == "before":
        trainer.periodic.insert(1, lambda state, _: crash(state.step == step))
    if how == "stop" and trainer.grid.is_first:
        before_step: Callable[[], None] = trainer.stability.before_step

        def stop_and_begin() -> None:  # also where this step is the first one after a resume
            if trainer.state.step == step - 1:
                stop.request()
            before_step()

        trainer.stability.before_step = stop_and_begin  # type: ignore[method-assign]
    folder = trainer.checkpoint.folder
    publish: Callable[..., None] = folder._publish

    def publish_or_end(new: NewCheckpoint, *others: Any) -> None:
        crash(how == "in" and new.step == step)
        if how == "late" and trainer.grid.is_first and new.step == step:
            stop.request()
        publish(new, *others)

    folder._publish = publish_or_end  # type: ignore[method-assign]


def plant(trainer: Trainer, spike: int) -> None:
    def problem(result: StepResult) -> str | None:
        state = trainer.state
        return "a spike" if state.step == spike and spike not in state.spike_steps else None

    trainer.stability.problem = problem  # type: ignore[method-assign]


def assert_same_losses(one: Path, other: Path) -> None:
    assert steps_in_file(other)[-1] == STEPS
    for name in ("loss", "lm_loss", "mtp_loss", "indexer_loss"):
        ours, theirs = column(one, name), column(other, name)
        assert len(ours) == STEPS and theirs == pytest.approx(ours, rel=1e-5, abs=1e-9), name


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("when", ["never", "always"])
def test_every_border_changes_the_degrees_and_no_loss(
    tiny: Path, tmp_path: Path, when: str
) -> None:
    """Killed before, in and after the saves at the borders, and stopped there.

    With anticipatory routing, the experts of a phase's first steps were selected at other degrees.
    """
    more = (f"stability.anticipatory_routing.when={when}",)
    deaths = DEATHS if when == "never" else []
    one, own = tmp_path / "one", tmp_path / "own"
    path = phased(tiny, tmp_path, STAGES)
    spawn(train_on, 4, path, one, ("parallel.tensor=2", *more), [], timeout=300)
    begins = spawn(train_on, 4, with_degrees(tiny, tmp_path), own, more, deaths, timeout=500)
    expected = [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 4] if deaths else [0, 1, 2, 3, 4]
    assert begins == [expected] * 4
    assert_same_losses(one, own)


@pytest.mark.slow
def test_a_rollback_across_a_border(tiny: Path, tmp_path: Path) -> None:
    """The second step of a phase is a spike: processes with the degrees before it go on."""
    settings = "{min_rollback_steps: 2, snapshot_every: 0, min_history: 2}"
    more = (f"stability.spikes={settings}", "stability.anticipatory_routing.active_steps=4")
    one, own = tmp_path / "one", tmp_path / "own"
    path = phased(tiny, tmp_path, STAGES)
    spawn(train_on, 2, path, one, ("parallel.tensor=2", *more), [], 9)
    stages = [dict(stage) for stage in STAGES]
    for stage in stages[3:]:
        stage["parallel"] = {"context": 2}
    begins = spawn(train_on, 2, phased(tiny, tmp_path, stages), own, more, [], 9)
    assert begins == [[0, 1, 0, 1]] * 2
    assert column(own, "rollbacks") == column(one, "rollbacks") == [0] * 6 + [1] * 7
    assert_same_losses(one, own)


def test_one_process_goes_on_by_itself(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [dict(stage) for stage in STAGES]
    stages[1]["parallel"] = {"recompute": ["block"]}
    (tmp_path / "alone").mkdir()
    train(phased(tiny, tmp_path / "alone", STAGES), tmp_path / "one", *COMMON)
    words = [str(phased(tiny, tmp_path, stages)), *COMMON, f"run_dir={tmp_path / 'own'}"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.count("the processes start again") == 2 and out.count("resumed from") == 2
    assert_same_run(tmp_path / "one", tmp_path / "own", STEPS)
