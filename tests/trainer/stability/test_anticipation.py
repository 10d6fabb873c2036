"""Anticipatory routing: whose weights choose, what is done with the choice, and resumes within it.

The judge of a choice is the router itself, of a model that holds saved weights: a hook on its
module notes what it chooses in a plain forward pass on one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data import Loader
from model import SampleLayout
from model.config import AttentionMode
from tests.trainer.config.test_recipe import phased
from tests.trainer.parallel.topologies import Job, Topology, run_all, topology
from tests.trainer.tiny import (
    assert_same_run,
    column,
    steps_in_file,
    train,
)
from trainer.build import build_native
from trainer.checkpoint.logical_tensors import is_routing, routing_name
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.run import RunCheckpoint
from trainer.config import ConfigError, RunConfig, load_config, load_run
from trainer.export.export import export_run
from trainer.metrics.jsonl import read_metrics
from trainer.metrics.layer_stats import expert_load_stats
from trainer.parallel.grid import Grid
from trainer.parallel.pipeline_stage import index_dtype
from trainer.state import TrainState
from trainer.trainer import Trainer

ALWAYS = "stability.anticipatory_routing.when=always"
LEAD = "stability.anticipatory_routing.lag_steps={}"
EVERY = ("checkpoint.every=1", "checkpoint.keep=0", "metrics.layer_stats_every=1")
STEPS = 5
ALONE = topology(1)
SLOW = pytest.mark.slow
SPREAD = [
    topology(4, "parallel.recompute=[block]", pipeline=2, expert=2),
    topology(4, tensor=2, context=2),
]


RunOf = Callable[[Topology, int], Path]


@pytest.fixture(scope="module")
def run_of(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunOf:
    """The run at a topology with a lead, every step saved; trained for the first who asks."""
    folder = tmp_path_factory.mktemp("anticipation")

    @cache
    def run(spread: Topology, lead: int) -> Path:
        job = Job(spread, folder / f"{spread.name}, lead {lead}")
        run_all(tiny, [job], ALWAYS, LEAD.format(lead), f"steps={STEPS}", *EVERY)
        return job.run_dir

    return run


def chosen_by(
    run_dir: Path, saved_at: int, step: int, attention: AttentionMode = "select"
) -> dict[int, Tensor]:
    """What learned routers with the weights of a checkpoint choose for a step's rows, by layer.

    [rows, length, A], sorted, of a plain forward pass on one rank, without our own code for it.
    """
    config = load_run(run_dir).alone()
    grid = Grid.single()
    local, optimizer = build_native(config, grid)
    checkpoint = RunCheckpoint(config, grid, local.model, optimizer, "", local.placements)
    path = run_dir / "checkpoints" / f"step-{saved_at:08d}"
    checkpoint.folder.load(path, checkpoint._tensors())
    selections: dict[int, list[Tensor]] = {}
    for row, router in local.model.routers().items():
        if not router.hashed:
            of_row = selections.setdefault(row, [])
            router.register_forward_hook(
                lambda _, __, out, of_row=of_row: of_row.append(out.indices_TA)
            )
    phases = [phase.rows for phase in config.recipe.phases]
    for batch in Loader(config.data, config.seed, phases=phases).at(step):
        layout = SampleLayout.from_lengths(batch.lengths, batch.tokens.shape[1])
        with torch.no_grad():
            local.model(batch.tokens, layout, batch.targets, attention=attention)
    length = config.recipe.at(step).rows.seq_len
    return {
        r: torch.cat(x).unflatten(0, (-1, length)).sort(-1).values for r, x in selections.items()
    }


def waiting(
    run_dir: Path, saved_at: int, step: int, layers: Sequence[int] = (1, 2, 3, 4)
) -> dict[int, Tensor]:
    """What a checkpoint holds for a later step, by layer, sorted."""
    stored = CheckpointReader(run_dir / "checkpoints" / f"step-{saved_at:08d}")
    names = {row: routing_name(step, row) for row in layers}
    tensors = stored.read(dict.fromkeys(names.values(), torch.uint8))
    return {row: tensors[name].sort(-1).values for row, name in names.items()}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("spread", "lead"),
    [(ALONE, 1), (ALONE, 3), *(pytest.param(spread, 3, marks=SLOW) for spread in SPREAD)],
    ids=lambda value: value.name if isinstance(value, Topology) else str(value),
)
def test_choices_are_those_of_earlier_weights(run_of: RunOf, spread: Topology, lead: int) -> None:
    run, otherwise = run_of(spread, lead), 0
    for step in range(lead + 1, STEPS):
        # Chosen in the step after the checkpoint of step - lead, and kept until they are used.
        pending = waiting(run, step - lead + 1, step)
        for later in range(step - lead + 2, step + 1):
            kept = waiting(run, later, step)
            assert all(torch.equal(pending[row], kept[row]) for row in pending), (step, later)
        old, present = chosen_by(run, step - lead, step), chosen_by(run, step, step)
        for row, chosen in pending.items():
            assert chosen.dtype == torch.uint8
            assert torch.equal(chosen.long(), old[row]), (step, row)
            otherwise += not torch.equal(old[row], present[row])
    assert otherwise, "older weights always chose the same: nothing was tested"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "spread",
    [ALONE, *(pytest.param(spread, marks=SLOW) for spread in SPREAD)],
    ids=lambda spread: spread.name,
)
def test_steps_use_the_choices_that_waited_for_them(run_of: RunOf, spread: Topology) -> None:
    """Loads of the step are those of what the checkpoint before it holds."""
    run = run_of(spread, 3)
    config = load_run(run)
    records = read_metrics(run / "metrics.jsonl")
    for step in range(1, STEPS):
        lengths = [
            row for batch in Loader(config.data, config.seed).at(step) for row in batch.lengths
        ]
        ends = torch.tensor([sum(samples) for samples in lengths])
        real = torch.arange(config.data.seq_len) < ends[:, None]
        for row, chosen in waiting(run, step, step).items():
            load = torch.bincount(chosen[real].flatten().long(), minlength=8)
            for name, (value,) in expert_load_stats(load[None]).items():
                assert records[step]["layers"][name][row] == value, (step, row, name)


@SLOW
@pytest.mark.timeout(600)
@pytest.mark.parametrize("spread", SPREAD, ids=lambda spread: spread.name)
def test_trains_like_one_rank(run_of: RunOf, spread: Topology) -> None:
    for name in ("loss", "balance_loss", "grad_norm"):
        alone, other = (column(run_of(t, 3), name) for t in (ALONE, spread))
        assert other == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("recompute", ["[]", "[block]"])
def test_a_lead_of_nothing_is_plain_training(tiny: Path, tmp_path: Path, recompute: str) -> None:
    """The choices go the same way as others, but are of the present weights."""
    common = ["steps=5", f"parallel.recompute={recompute}"]
    train(tiny, tmp_path / "plain", *common)
    train(tiny, tmp_path / "none", *common, ALWAYS, LEAD.format(0))
    assert_same_run(tmp_path / "plain", tmp_path / "none", 5)
    train(tiny, tmp_path / "one", *common, ALWAYS, LEAD.format(1))
    one, none = (column(tmp_path / name, "loss") for name in ("one", "none"))
    assert one[0] == none[0] and one != none


def test_a_run_resumes_in_the_middle_of_it(tiny: Path, tmp_path: Path) -> None:
    """To the bit at the same topology; rows that two ranks share with a filler, on one rank."""
    common = ["steps=9", ALWAYS, LEAD.format(2)]
    train(tiny, tmp_path / "straight", *common)
    train(tiny, tmp_path / "halves", *common, stop_at=5)
    train(tiny, tmp_path / "halves", *common)
    assert steps_in_file(tmp_path / "halves") == list(range(1, 10))
    assert_same_run(tmp_path / "straight", tmp_path / "halves", 9)


@SLOW
@pytest.mark.timeout(600)
def test_choices_that_wait_open_at_another_topology(tiny: Path, tmp_path: Path) -> None:
    """Five rows: two data ranks share them with a filler."""
    overrides = (ALWAYS, LEAD.format(2), "steps=7", "data.global_batch_size=5")
    run_all(tiny, [Job(ALONE, tmp_path / "alone")], *overrides)
    for spread, stop_at in ((topology(2), 3), (topology(2, context=2), 5), (ALONE, 0)):
        run_all(tiny, [Job(spread, tmp_path / "moved", stop_at)], *overrides)
    alone, moved = (column(tmp_path / name, "loss") for name in ("alone", "moved"))
    assert moved == pytest.approx(alone, rel=1e-5)


def test_another_lead_or_none_at_all_may_go_on(tiny: Path, tmp_path: Path) -> None:
    config = train(tiny, tmp_path, "steps=4", ALWAYS, LEAD.format(2), stop_at=2)
    stored = CheckpointReader(tmp_path / "checkpoints/step-00000002")
    assert sum(is_routing(name) for name in stored.shapes) == 2 * 3
    export_run(config, tmp_path / "hf", Grid.single())
    state = trainer_state(load_config(tiny, [f"run_dir={tmp_path}", ALWAYS, LEAD.format(1)]))
    assert (state.step, state.anticipation_start) == (2, 2), "it starts again"
    state = trainer_state(load_config(tiny, [f"run_dir={tmp_path}", ALWAYS, LEAD.format(2)]))
    assert (state.step, state.anticipation_start) == (2, 0), "it continues"
    train(tiny, tmp_path, "steps=4")
    assert steps_in_file(tmp_path) == [1, 2, 3, 4]
    assert column(tmp_path, "anticipatory_routing") == [True, True, False, False]


@pytest.mark.parametrize(
    ("end", "pending", "start"), [(2, [], 3), (4, [3], 3), (5, [3, 4], 0), (None, [3, 4], 0)]
)
def test_always_resumes_after_and_in_earlier_routing(
    tiny: Path, tmp_path: Path, end: int | None, pending: list[int], start: int
) -> None:
    """Routing from step 0 that ended, ends within the lag, or lasts longer; resumed at step 3."""
    config = load_config(tiny, [f"run_dir={tmp_path}", "steps=6", ALWAYS, LEAD.format(2)])
    trainer = Trainer(config, Grid.single())
    state, anticipation = trainer.state, trainer.anticipation
    state.step, state.anticipation_start, state.anticipation_end = 3, 0, end
    saved = anticipation.metadata() | {"steps": pending}
    anticipation.restore(saved, state)
    assert (state.anticipation_start, state.anticipation_end) == (start, None)
    for state.step in range(3, 6):
        assert anticipation.select(state, anticipation.batches(state.step))


def trainer_state(config: RunConfig) -> TrainState:
    trainer = Trainer(config, Grid.single())
    trainer.checkpoint.load(trainer.state)
    return trainer.state


def test_a_lead_reaches_into_the_next_phase(tiny: Path, tmp_path: Path) -> None:
    """Rows of another length, chosen for with another attention; stopped with such choices."""
    first = {"until_tokens": 768, "attention": "dense", "seq_len": 64}
    second = {"until_tokens": 1800, "attention": "warmup", "seq_len": 96}
    path = phased(tiny, tmp_path, [first, second])
    train(path, tmp_path / "straight", ALWAYS, LEAD.format(2))
    train(path, tmp_path / "halves", ALWAYS, LEAD.format(2), stop_at=2)
    train(path, tmp_path / "halves", ALWAYS, LEAD.format(2))
    assert_same_run(tmp_path / "straight", tmp_path / "halves", 6)
    with pytest.raises(
        ConfigError, match=r"lag_steps = 4 should be at most 3, the steps of phases\.0"
    ):
        load_config(path, [ALWAYS, LEAD.format(4)])
    load_config(path, [ALWAYS, LEAD.format(3)])
    load_config(path, [LEAD.format(4)])  # nothing switches it on


def test_a_step_of_the_next_phase_is_looked_at_with_its_attention(
    tiny: Path, tmp_path: Path
) -> None:
    """With other selected entries, later layers get other streams and select other experts."""
    first = {"until_tokens": 576, "attention": "warmup", "seq_len": 96, "global_batch_size": 2}
    path = phased(tiny, tmp_path, [first, first | {"until_tokens": 1152, "attention": "sparse"}])
    train(path, tmp_path / "run", ALWAYS, LEAD.format(1), *EVERY)
    pending = waiting(tmp_path / "run", 3, 3, (1, 2, 3))
    sparse, dense = (chosen_by(tmp_path / "run", 2, 3, mode) for mode in ("sparse", "dense"))
    assert all(torch.equal(pending[row].long(), sparse[row]) for row in pending)
    assert any(not torch.equal(sparse[row], dense[row]) for row in pending)


def test_the_smallest_integers_that_hold_an_expert() -> None:
    for experts, dtype in ((256, torch.uint8), (257, torch.int16), (32768, torch.int16)):
        assert index_dtype(experts) == dtype
        assert torch.tensor(experts - 1, dtype=dtype) == experts - 1
    assert index_dtype(32769) == torch.int32
