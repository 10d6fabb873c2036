"""A dry run compared with really built ranks, and the totals of the large configs."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data import Loader
from model.kernels import host
from model.kernels.grouped_mm import eager as grouped_mm
from model.parameters import parameter_shapes
from tests.distributed import spawn
from tests.trainer.parallel.topologies import MODEL, Topology, topology
from trainer.build import build_native
from trainer.checkpoint.logical_tensors import live_slices
from trainer.config import ConfigError, load_config
from trainer.engine import NativeEngine
from trainer.parallel.degrees import Degrees
from trainer.parallel.grid import Grid
from trainer.parallel.pipeline import Pipeline
from trainer.planning.activations import Live, Storages, peak_in_flight, tensors_in
from trainer.planning.dry_run import as_rank, count_memory, microbatches_of
from trainer.planning.static_memory import memory_parts, pipeline_rank_memory

CONFIGS = Path(__file__).parents[3] / "configs"
SCHEDULES = ("1f1b", "interleaved_1f1b", "zero_bubble_v", "dual_pipe_v")
TOPOLOGIES = [
    topology(2),
    topology(2, tensor=2),
    topology(2, context=2),
    topology(2, expert=2),
    topology(2, "parallel.recompute=[streams, attention]"),
    topology(2, pipeline=2),
]
MORE = [
    topology(2, "precision=bf16", tensor=2),
    topology(2, expert_tensor=2),
    topology(2, "parallel.recompute=[block]", pipeline=2),
    *[topology(2, pipeline=2, pipeline_schedule=name) for name in SCHEDULES[1:]],
]


def hold(rank: int, world: int, path: Path, words: tuple[str, ...]) -> Any:
    """Worker: what a rank holds: parameters, bytes by part, of snapshots, and most of passes.

    Passes run plain torch, as the dry run does; a CPU's fused loops and MKL's matmuls of all
    groups, which need less padding, hold no more.
    """
    config = load_config(path, words)
    grid = Grid.build(config.degrees(world), torch.device("cpu"))
    local, optimizer = build_native(config, grid)
    engine = NativeEngine(local, grid)
    model = local.model
    lasting = [*model.parameters(), *model.buffers()]
    weights = {tensor.untyped_storage().data_ptr() for tensor in lasting}
    batches = Loader(config.data, 0, grid.data.rank, grid.data.size).at(0)
    engine.forward_backward(batches)  # what is made once is there now
    grads = [parameter.grad for parameter in model.parameters()]
    parts = {
        "weights": lasting,
        "gradients": grads,
        "master weights": [
            master
            for master in optimizer.owned()
            if master.untyped_storage().data_ptr() not in weights
        ],
        "optimizer states": [p.tensor for p in optimizer.states() if p.kind != "master"],
    }
    resident = {name: sum(t.nbytes for t in tensors) for name, tensors in parts.items()}
    sizes = [each.tensor.nbytes for each in live_slices(model, optimizer.states())]
    snapshots = sum(sizes), sum(max(4096, 2 ** math.ceil(math.log2(size))) for size in sizes)
    gc.collect()
    known = Storages([*lasting, *grads])
    with Live(known) as fused:
        engine.forward_backward(batches)
    with pytest.MonkeyPatch.context() as patch, Live(known) as live:
        patch.setattr(host, "runs", lambda *_, **__: False)
        patch.setattr(grouped_mm, "_by_mkl", lambda *_: False)
        engine.forward_backward(batches)
    assert fused.peak <= live.peak
    return sum(p.numel() for p in model.parameters()), resident, snapshots, live.peak


@pytest.mark.parametrize(
    "spread",
    [*TOPOLOGIES, *(pytest.param(spread, marks=pytest.mark.slow) for spread in MORE)],
    ids=lambda spread: spread.name,
)
def test_counts_what_ranks_really_hold(tiny: Path, spread: Topology) -> None:
    """Everything resident to the byte, in closed form as well; the passes within a tenth.

    Routing is uneven in truth, and a rank's rows are not one sample each.
    """
    words = (*MODEL, *spread.overrides)
    really = spawn(hold, 2, tiny, words)
    config = load_config(tiny, words)
    found = count_memory(config, 2)
    assert [rank.rank for rank in found.ranks] == [0, 1]
    for rank, (parameters, parts, snapshots, peak) in zip(found.ranks, really, strict=True):
        assert rank.parameters == parameters
        assert rank.resident == parts
        closed_form = pipeline_rank_memory(config, found.degrees, rank.pipeline)
        of_stage = rank.rank - rank.pipeline * len(closed_form.loads)
        assert closed_form.parts(of_stage) == parts
        locked = [closed_form.snapshot(of_stage, page_locked) for page_locked in (False, True)]
        assert (*locked,) == snapshots
        passes = rank.microbatches + rank.activations + rank.workspace
        print(f"{spread.name} rank {rank.rank}: {peak:,} B really, {passes:,} B by the dry run")
        # Schedules with two stages on a rank keep what they send to the step's end (torch waits
        # for it there), which the dry run does not count.
        several = "schedule" in spread.name and "1f1b" not in spread.name.split()
        assert 0.9 * passes < peak < (1.25 if several else 1.1) * passes
    elements = sum(shape_size(shape) for shape in parameter_shapes(config.model).values())
    assert found.parameters == elements
    full = max(found.ranks, key=lambda rank: sum(rank.resident.values()))
    assert memory_parts(config, found.degrees) == full.resident


def shape_size(shape: Iterable[int]) -> int:
    return int(torch.Size(tuple(shape)).numel())


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_in_flight_as_torch_orders_it(tiny: Path, schedule: str, ranks: int) -> None:
    """A count of our own over torch's list of actions, written as text."""
    words = [f"parallel.pipeline={ranks}", f"parallel.pipeline_schedule={schedule}"]
    layers = "[window, csa, hca, csa, window, csa, hca, csa]"
    words += [
        "model.num_hidden_layers=8",
        f"model.layer_types={layers}",
        "data.global_batch_size=16",
    ]
    config = load_config(tiny, [*MODEL, *words])
    degrees = config.degrees(ranks)
    found = count_memory(config, ranks)
    for rank in range(ranks):
        with as_rank(rank, degrees) as grid:
            plan = config.parallel.stages(config.model, config.data.seq_len)
            order = actions(config, grid, plan)
        mine = found.ranks[rank].stages
        most, held = 0, {stage.number: stage.activations for stage in mine}
        alive: set[tuple[str, str]] = set()
        for action in order:
            parts = action.strip("()").split(";")
            for part in sorted(parts, key=lambda text: "F" not in text):
                stage, kind, micro = split(part)
                if kind == "F":
                    alive.add((stage, micro))
                elif kind in "BW":
                    # 1F1B's list numbers the last stage's microbatches otherwise.
                    alive.discard((stage, micro) if (stage, micro) in alive else min(alive))
                most = max(most, sum(held[int(stage)] for stage, _ in alive))
        assert sum(stage.activations * stage.in_flight for stage in mine) == most
        if schedule == "1f1b":
            assert [stage.in_flight for stage in mine] == [ranks - rank]
        assert microbatches_of(found.phase, degrees) == 16


def actions(config: Any, grid: Grid, plan: Any) -> list[str]:
    """A rank's actions in torch's schedule, as text."""
    from trainer.parallel.plan import build_local_model

    local = build_local_model(config.model, torch.float32, grid, plan)
    pipeline = Pipeline(local.model, plan, grid.pipeline)
    schedule = pipeline.schedule(16, 48)
    lines = [str(a).split(")")[0] for a in schedule.pipeline_order[grid.rank] if a is not None]
    return [line for line in lines if "REDUCE" not in line]


def split(action: str) -> tuple[str, str, str]:
    """`3F12` to 3, F, 12."""
    at = next(place for place, letter in enumerate(action) if letter.isalpha())
    return action[:at], action[at], action[at + 1 :]


def test_what_is_in_flight_is_weighed() -> None:
    class Action:
        def __init__(self, stage: int, kind: str) -> None:
            from torch.distributed.pipelining.schedules import _ComputationType

            self.stage_index, self.sub_actions = stage, None
            self.computation_type = _ComputationType(kind)

    order = [Action(0, "F"), Action(0, "F"), None, Action(1, "F"), Action(0, "B"), Action(1, "F")]
    assert peak_in_flight(order, {0: 10, 1: 1}) == {0: 2, 1: 1}
    assert peak_in_flight(order, {0: 1, 1: 10}) == {0: 1, 1: 2}


def test_live_bytes() -> None:
    known = torch.zeros(100)
    with Live(Storages([known])) as live:
        alive = torch.zeros(10) + 1
        assert (live.now, live.peak) == (40, 80)
        known += 1
        view = alive[3:]
        assert live.now == 40
        del alive
        assert live.now == 40
        del view
        assert live.now == 0


def test_tensors_of_a_microbatch_are_found(tiny: Path) -> None:
    from model import V4Model

    config = load_config(tiny, MODEL)
    with torch.device("meta"):
        model = V4Model(config.model)
    tokens = torch.zeros(1, 48, dtype=torch.int64, device="meta")
    micro = model.microbatch(tokens, targets=None)
    found = Storages(tensors_in(micro))
    assert micro.next_T in found and micro.positions.rotation("csa") in found
    assert micro.positions.ranges("hca").entry_end_T in found
    assert not any(parameter in found for parameter in model.parameters())


def test_what_does_not_fit_is_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="does not divide the 3 processes"):
        count_memory(load_config(tiny, [*MODEL, "parallel.tensor=2"]), 3)
    with as_rank(0, Degrees(2)), pytest.raises(RuntimeError, match="makes its own process groups"):
        count_memory(load_config(tiny, MODEL), 2)
    assert not dist.is_initialized()


@pytest.mark.large
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("name", "world", "main", "mtp"),
    [("flash", 256, "284.332", "6.610"), ("pro", 2048, "1572.997", "25.840")],
)
def test_large_configs_fit(name: str, world: int, main: str, mtp: str) -> None:
    found = count_memory(load_config(CONFIGS / f"{name}.yaml"), world, phase=3)
    assert found.phase.name == "sparse 64K"
    assert found.parameters / 1e9 == pytest.approx(float(main) + float(mtp), abs=1e-3)
    assert found.fullest.total < 0.9 * 80e9
