"""Every pipeline balance that the shipped configs can have: what a stage lacks is no error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from model import ModelConfig
from tests.distributed import spawn
from tests.trainer.tiny import column, train_jobs
from trainer.build import make_local, make_optimizer
from trainer.config import RunConfig, load_config
from trainer.engine import NativeEngine
from trainer.parallel.stage_plan import StagePlan
from trainer.planning.dry_run import as_rank, count_memory
from trainer.planning.static_memory import pipeline_rank_memory

CONFIGS = Path(__file__).parents[3] / "configs"
SCHEDULES = ("1f1b", "interleaved_1f1b", "zero_bubble_v", "dual_pipe_v")
# The model of configs/debug.yaml, in rows and shards of the tiny run.
DEBUG_MODEL = [
    f"model.{name}={value}".replace("'", "").replace("None", "null")
    for name, value in load_config(CONFIGS / "debug.yaml").model.model_dump(mode="json").items()
    if name != "num_nextn_predict_layers"
]
STEPS = [
    "model.num_nextn_predict_layers=0",
    "steps=2",
    "data.micro_batch_size=1",
    "data.global_batch_size=8",
    "metrics.layer_stats_every=1",
    "optim.adamw.eps=1e-5",
]


def balances(name: str, schedules: Sequence[str]) -> Iterator[RunConfig]:
    """A shipped config with and without MTP, at every pipeline degree of these schedules."""
    config = load_config(CONFIGS / f"{name}.yaml")
    for num_mtp in (0, 1):
        model = config.model.model_copy(update={"num_nextn_predict_layers": num_mtp})
        for schedule in schedules:
            for pipeline in range(1, model.num_hidden_layers + 2):
                update = {
                    "tensor": 1,
                    "expert": 1,
                    "context": 1,
                    "pipeline": pipeline,
                    "pipeline_schedule": schedule,
                }
                parallel = config.parallel.model_copy(update=update)
                if not list(parallel.problems(model)):
                    yield config.model_copy(update={"model": model, "parallel": parallel})


def parts_of(model: ModelConfig, plan: StagePlan, rank: int) -> tuple[object, ...]:
    """What a pipeline rank has, as far as the absence of a part can matter."""
    stages = []
    for number in plan.stages_of(rank):
        layers = plan.layers_of(number)
        kinds = {(model.layer_types[layer], layer < model.num_hash_layers) for layer in layers}
        stages.append((frozenset(kinds), number == 0, plan.is_last(number)))
    return (*stages, model.num_nextn_predict_layers)


@pytest.mark.parametrize(
    ("name", "schedules"),
    [
        ("debug", SCHEDULES),
        ("nano", SCHEDULES),
        ("flash", SCHEDULES[:1]),
        pytest.param("pro", SCHEDULES[:1], marks=pytest.mark.slow),
    ],
)
def test_every_automatic_balance_of_a_shipped_config_is_built(
    name: str, schedules: Sequence[str]
) -> None:
    """A rank of each combination of parts, with its optimizer and its stages, on meta."""
    built: set[tuple[object, ...]] = set()
    for config in balances(name, schedules):
        degrees = config.parallel.degrees(config.parallel.pipeline)
        plan = config.parallel.stages(config.model, config.segment.seq_len)
        for rank in range(degrees.pipeline):
            if (parts := parts_of(config.model, plan, rank)) in built:
                continue
            built.add(parts)
            pipeline_rank_memory(config, degrees, rank)
            with as_rank(rank, degrees) as grid:
                local = make_local(config, grid)
                optimizer = make_optimizer(config, local, grid)
                engine = NativeEngine(local, grid, optimizer)
                assert len(engine.pipeline.stage_modules) == config.parallel.stages_per_rank
    head_only = (frozenset(), False, True)
    assert any(head_only in parts for parts in built), "none has a stage with the head alone"
    assert {parts[-1] for parts in built} == {0, 1}


@pytest.mark.parametrize("pipeline", [3, 7])
def test_a_stage_with_the_head_alone_is_planned(pipeline: int) -> None:
    overrides = [f"parallel.pipeline={pipeline}", "model.num_nextn_predict_layers=0"]
    config = load_config(CONFIGS / "debug.yaml", [*overrides, "data.micro_batch_size=1"])
    plan = config.parallel.stages(config.model, config.segment.seq_len)
    assert plan.layer_counts[-1] == 0
    assert count_memory(config, pipeline).ranks[-1].stages[-1].activations > 0


def assert_trains_alike(tiny: Path, folder: Path, steps: list[str], *runs: tuple[int, str]) -> None:
    """The runs have a stage with the head alone, and losses as on one process."""
    train_jobs(0, 1, tiny, folder, [("alone", steps, 0)])
    for world, schedule in runs:
        name = f"{world} {schedule}"
        spread = [f"parallel.pipeline={world}", f"parallel.pipeline_schedule={schedule}"]
        config = load_config(tiny, [*steps, *spread])
        assert config.parallel.stages(config.model, config.segment.seq_len).layer_counts[-1] == 0
        spawn(train_jobs, world, tiny, folder, [(name, [*steps, *spread], 0)], timeout=240)
        for metric in ("loss", "grad_norm"):
            ours, theirs = (column(folder / run, metric) for run in (name, "alone"))
            assert ours == pytest.approx(theirs, rel=1e-5), (name, metric)


def test_a_stage_with_the_head_alone_trains(tiny: Path, tmp_path: Path) -> None:
    assert_trains_alike(tiny, tmp_path, STEPS, (2, "interleaved_1f1b"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_debug_model_trains_at_every_schedule(tiny: Path, tmp_path: Path) -> None:
    """A step of its sizes on rows of the tiny run, balanced automatically."""
    runs = [(3, "1f1b"), *((2, schedule) for schedule in SCHEDULES[1:])]
    assert_trains_alike(tiny, tmp_path, [*STEPS, *DEBUG_MODEL, "steps=1"], *runs)
