"""The assignment of matrices to ranks: even, whole, everything once."""

from collections import Counter
from pathlib import Path

import pytest
import yaml

from model.config import ModelConfig
from model.parameters import parameter_shapes, parameter_table
from optim import OptimConfig, build_table
from optim.config import MuonConfig
from optim.zero.plan import (
    Held,
    Layout,
    Load,
    Summary,
    loads_of,
    newton_schulz_cost,
    plan_layout,
    plan_owners,
)
from tests.optim.debug_parameters import FACTS, shapes

CONFIGS = Path(__file__).parents[3] / "configs"
MUON = MuonConfig()


def layouts_of(name: str, ranks: int) -> list[Layout]:
    """Experts and everything else of a shipped model that `ranks` ranks hold whole."""
    model = ModelConfig(**yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"])
    table = build_table(parameter_shapes(model), parameter_table(model), OptimConfig())
    held = [Held(entry, entry.shape) for entry in table]
    experts = [line for line in held if ".experts." in line.entry.name]
    others = [line for line in held if line not in experts]
    return [plan_owners(group, ranks, 1, MUON, 0.1) for group in (experts, others)]


def summary_of(layouts: list[Layout], ranks: int) -> Summary:
    loads = [Load() for _ in range(ranks)]
    for layout in layouts:
        by_owner = loads_of(layout, MUON)
        loads = [load + by_owner[rank % layout.owners][0] for rank, load in enumerate(loads)]
    return Summary(loads)


@pytest.mark.parametrize(
    ("name", "ranks", "owners", "excess"), [("flash", 64, 64, 1.003), ("pro", 512, 128, 1.032)]
)
def test_shipped_models_divide_evenly(name: str, ranks: int, owners: int, excess: float) -> None:
    """As docs/optimizer.md says, and better than by cost or by size alone.

    Pro's 124 largest matrices are too few for 512: 128 ranks own what experts are not.
    """
    layouts = layouts_of(name, ranks)
    assert [layout.owners for layout in layouts] == [ranks, owners]
    assert all(layout.padding < 0.1 for layout in layouts)
    summary = summary_of(layouts, ranks)
    least, _, most = summary.state_spread
    total = sum(
        piece.state * (12 if piece.matrices is None else 8) for l in layouts for piece in l.pieces
    )
    assert 0.9 * total / ranks <= least <= most <= 1.1 * total / ranks
    assert round(summary.newton_schulz_excess, 3) <= excess
    assert f"{most / 2**20:,.2f} at most" in summary.words()
    assert summary.table().row_count == 4


def test_adamw_fills_up_what_matrices_leave_free() -> None:
    """The fullest owner holds no more than it must: its largest matrix, or an equal share."""
    table = build_table(shapes(), FACTS, OptimConfig())
    held = [Held(entry, entry.shape) for entry in table]
    total = sum(_elements(line) for line in held)
    for owners in (2, 5, 40):
        layout = plan_layout(held, owners, 1, MUON)
        matrices = Counter[int]()
        for piece in layout.pieces:
            matrices[piece.owner] += piece.size * (piece.matrices is not None)
        assert layout.part == max(max(matrices.values()), -(-total // owners))


def test_fewer_owners_where_padding_would_be_large() -> None:
    held = [
        Held(entry, entry.shape)
        for entry in build_table(shapes(), FACTS, OptimConfig())
        if entry.matrices is not None and ".experts." not in entry.name
    ]
    owners = [plan_owners(held, 64, 1, MUON, padding).owners for padding in (0.0, 0.1, 1.0, 1e9)]
    assert owners[0] < owners[1] < owners[2] < owners[3] == 64
    for padding in (0.1, 1.0):
        assert plan_owners(held, 64, 1, MUON, padding).padding <= padding


@pytest.mark.parametrize("ranks", [1, 3, 8, 500])
@pytest.mark.parametrize("homes", [1, 2])
def test_every_element_has_one_place_and_no_matrix_is_split(ranks: int, homes: int) -> None:
    table = build_table(shapes(), FACTS, OptimConfig())
    held = []
    for entry in table:
        joined = homes > 1 and "shared_experts.w1" in entry.name
        local = (entry.shape[0] // homes, *entry.shape[1:]) if joined else entry.shape
        held.append(Held(entry, local, joined))
    layout = plan_layout(held, ranks, homes, MUON)
    ends: dict[str, int] = {}
    for piece in sorted(layout.pieces, key=lambda piece: (piece.name, piece.start)):
        assert piece.start == ends.get(piece.name, 0)
        ends[piece.name] = piece.stop
        assert (piece.home is not None) == next(
            h.joined for h in held if h.entry.name == piece.name
        )
    assert ends == {line.entry.name: _elements(line) for line in held}
    for owner in range(ranks):
        filled = 0
        for piece in layout.pieces:
            if piece.owner == owner:
                assert piece.position == filled
                filled += piece.size
        assert filled <= layout.part
    whole = Counter[str]()
    for piece in layout.pieces:
        if piece.matrices is not None:
            whole[piece.name] += piece.matrices[0]
            assert piece.state == piece.size * (homes if piece.home is not None else 1)
    assert whole == {e.name: e.matrices[0] for e in table if e.matrices is not None}


def _elements(held: Held) -> int:
    size = 1
    for extent in held.local:
        size *= extent
    return size


def test_cost_counts_the_products_of_a_step() -> None:
    """Gram and update of [2, 3]: 2·2·2·3 each; the Gram matrix's square: 2·2·2·2."""
    assert newton_schulz_cost(3, 2, MuonConfig(coarse_steps=1, fine_steps=0)) == 24 + 24 + 16
    polar = MuonConfig(newton_schulz="polar_express", polar_express_steps=3)
    assert newton_schulz_cost(2, 3, polar) == 3 * (24 + 24 + 16)
