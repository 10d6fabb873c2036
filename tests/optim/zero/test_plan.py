"""The assignment of matrices to owners: balanced, unsplit, every element once."""

from collections import Counter
from pathlib import Path

import pytest

from model.parameters import parameter_shapes, parameter_table
from optim import MuonConfig, OptimConfig, build_table
from optim.zero.loads import Load, LoadSummary, loads_of
from optim.zero.plan import (
    Layout,
    LocalParameter,
    newton_schulz_flops,
    plan_layout,
    plan_owners,
)
from tests.optim.debug_parameters import FACTS, shapes
from trainer.config import load_config

CONFIGS = Path(__file__).parents[3] / "configs"
MUON = MuonConfig()


def layouts_of(name: str, ranks: int) -> list[Layout]:
    """Experts and everything else of a shipped model that `ranks` ranks hold unsharded."""
    model = load_config(CONFIGS / f"{name}.yaml").model
    table = build_table(parameter_shapes(model), parameter_table(model), OptimConfig())
    parameters = [LocalParameter(entry, entry.shape) for entry in table]
    experts = [p for p in parameters if ".experts." in p.assignment.name]
    others = [p for p in parameters if p not in experts]
    return [plan_owners(group, ranks, 1, MUON, 0.1) for group in (experts, others)]


def summary_of(layouts: list[Layout], ranks: int) -> LoadSummary:
    loads = [Load() for _ in range(ranks)]
    for layout in layouts:
        by_owner = loads_of(layout, MUON)
        loads = [load + by_owner[rank % layout.owners][0] for rank, load in enumerate(loads)]
    return LoadSummary(loads)


@pytest.mark.parametrize(
    ("name", "ranks", "owners", "excess"), [("flash", 64, 64, 1.003), ("pro", 512, 128, 1.032)]
)
def test_shipped_models_divide_evenly(name: str, ranks: int, owners: int, excess: float) -> None:
    """As docs/optimizer.md says, and better than by FLOPs or by elements alone.

    Pro's 124 largest matrices are too few for 512: 128 ranks own what is not experts.
    """
    layouts = layouts_of(name, ranks)
    assert [layout.owners for layout in layouts] == [ranks, owners]
    assert all(layout.padding < 0.1 for layout in layouts)
    summary = summary_of(layouts, ranks)
    low, mean, high = summary.state_bytes_range
    sizes = [
        sum(s.state_size * (12 if s.matrices is None else 8) for s in layout.slices)
        for layout in layouts
    ]
    assert 0.9 * sum(sizes) / ranks <= low <= high <= 1.1 * sum(sizes) / ranks
    assert mean == sum(size / layout.owners for size, layout in zip(sizes, layouts, strict=True))
    assert round(summary.newton_schulz_imbalance, 3) <= excess
    assert f"max {high / 2**20:,.2f}" in summary.sentence()
    assert summary.table().row_count == 4


def test_adamw_fills_the_room_that_matrices_leave() -> None:
    """The largest partition is minimal: the matrices of its owner, or an equal share."""
    table = build_table(shapes(), FACTS, OptimConfig())
    parameters = [LocalParameter(entry, entry.shape) for entry in table]
    total = sum(_elements(p) for p in parameters)
    for owners in (2, 5, 40):
        layout = plan_layout(parameters, owners, 1, MUON)
        matrices = Counter[int]()
        for owned in layout.slices:
            matrices[owned.owner] += owned.size * (owned.matrices is not None)
        assert layout.partition_size == max(max(matrices.values()), -(-total // owners))


def test_fewer_owners_where_padding_would_be_large() -> None:
    parameters = [
        LocalParameter(entry, entry.shape)
        for entry in build_table(shapes(), FACTS, OptimConfig())
        if entry.matrices is not None and ".experts." not in entry.name
    ]
    owners = [
        plan_owners(parameters, 64, 1, MUON, padding).owners for padding in (0.0, 0.1, 1.0, 1e9)
    ]
    assert owners[0] < owners[1] < owners[2] < owners[3] == 64
    for padding in (0.1, 1.0):
        assert plan_owners(parameters, 64, 1, MUON, padding).padding <= padding


@pytest.mark.parametrize("ranks", [1, 3, 8, 500])
@pytest.mark.parametrize("num_shard_ranks", [1, 2])
def test_every_element_has_one_owner_and_no_matrix_is_split(
    ranks: int, num_shard_ranks: int
) -> None:
    table = build_table(shapes(), FACTS, OptimConfig())
    parameters = []
    for entry in table:
        is_sharded = num_shard_ranks > 1 and "shared_experts.w1" in entry.name
        shape = (entry.shape[0] // num_shard_ranks, *entry.shape[1:]) if is_sharded else entry.shape
        parameters.append(LocalParameter(entry, shape, is_sharded))
    layout = plan_layout(parameters, ranks, num_shard_ranks, MUON)
    ends: dict[str, int] = {}
    for owned in sorted(layout.slices, key=lambda owned: (owned.name, owned.start)):
        assert owned.start == ends.get(owned.name, 0)
        ends[owned.name] = owned.stop
        assert (owned.assembly_rank is not None) == next(
            p.is_sharded for p in parameters if p.assignment.name == owned.name
        )
    assert ends == {p.assignment.name: _elements(p) for p in parameters}
    for owner in range(ranks):
        filled = 0
        for owned in layout.slices:
            if owned.owner == owner:
                assert owned.offset == filled
                filled += owned.size
        assert filled <= layout.partition_size
    matrices = Counter[str]()
    for owned in layout.slices:
        if owned.matrices is not None:
            matrices[owned.name] += owned.matrices[0]
            shards = 1 if owned.assembly_rank is None else num_shard_ranks
            assert owned.state_size == owned.size * shards
    assert matrices == {e.name: e.matrices[0] for e in table if e.matrices is not None}


def test_equal_matrices_are_divided_over_owners_and_assembly_ranks() -> None:
    table = build_table(shapes(), FACTS, OptimConfig())
    entry = next(entry for entry in table if entry.name.endswith(".experts.w1"))
    experts, rows, columns = entry.shape
    stack = LocalParameter(entry, (experts, rows // 2, columns), is_sharded=True)
    matrices = Counter[tuple[int, int | None]]()
    for owned in plan_layout([stack], 3, 2, MUON).slices:
        assert owned.matrices is not None
        matrices[owned.owner, owned.assembly_rank] += owned.matrices[0]
    assert len(matrices) == 6 and set(matrices.values()) == {experts // 6}


def _elements(parameter: LocalParameter) -> int:
    size = 1
    for extent in parameter.shape:
        size *= extent
    return size


def test_flops_are_the_matmuls_of_a_step() -> None:
    """Gram and update of [2, 3]: 2·2·2·3 each; the Gram matrix's square: 2·2·2·2."""
    assert newton_schulz_flops(3, 2, MuonConfig(coarse_steps=1, fine_steps=0)) == 24 + 24 + 16
    polar = MuonConfig(newton_schulz="polar_express", polar_express_steps=3)
    assert newton_schulz_flops(2, 3, polar) == 3 * (24 + 24 + 16)
