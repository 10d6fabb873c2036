"""The table: complete, unambiguous, and the matrices are those of the report."""

import pytest
from rich.console import Console

from optim.config import MuonConfig, OptimConfig
from optim.errors import OptimError
from optim.partition import build_table, render_table
from tests.optim.debug_parameters import FACTS, D, E, F, G, H, I, J, K, N, O, Q, shapes


def stacks(**muon: str) -> dict[str, tuple[int, int, int] | None]:
    table = build_table(shapes(), FACTS, OptimConfig(muon=MuonConfig(**muon)))
    return {entry.name: entry.matrices for entry in table}


def test_every_parameter_exactly_once() -> None:
    table = build_table(shapes(), FACTS, OptimConfig())
    assert [entry.name for entry in table] == list(shapes())
    for entry in table:
        assert (entry.matrices is None) == (entry.optimizer == "adamw")
        assert entry.shape == shapes()[entry.name]
        assert entry.weight_decay == 0.1


def test_adamw_has_what_the_report_lists() -> None:
    names_of_adamw = ("embed.", "head.weight", "norm", ".base", ".scale", "attn_sink", "ape")
    for name, matrices in stacks().items():
        assert (matrices is None) == any(word in name for word in names_of_adamw), name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.0.attn.wq_a.weight", (1, Q, D)),
        ("layers.0.attn.wq_b.weight", (1, H * K, Q)),
        ("layers.0.attn.wo_a.weight", (G, O, H * K // G)),
        ("layers.0.attn.wo_b.weight", (1, D, G * O)),
        ("layers.1.attn.compressor.wkv.weight", (2, K, D)),
        ("layers.1.attn.compressor.wgate.weight", (2, K, D)),
        ("layers.2.attn.compressor.wkv.weight", (1, K, D)),
        ("layers.1.attn.indexer.wq_b.weight", (1, I * J, Q)),
        ("layers.1.attn.indexer.weights_proj.weight", (1, I, D)),
        ("layers.1.attn.indexer.compressor.wgate.weight", (2, J, D)),
        ("layers.1.hc_ffn.fn", (1, (2 + N) * N, N * D)),
        ("hc_head.fn", (1, N, N * D)),
        ("mtp.0.hc_head.fn", (1, N, N * D)),
        ("layers.2.ffn.gate.weight", (1, E, D)),
        ("layers.2.ffn.experts.w1", (E, F, D)),
        ("layers.2.ffn.experts.w2", (E, D, F)),
        ("mtp.0.ffn.shared_experts.w2.weight", (1, D, F)),
        ("mtp.0.e_proj.weight", (1, D, D)),
    ],
)
def test_matrices(name: str, expected: tuple[int, int, int]) -> None:
    assert stacks()[name] == expected


def test_queries_per_head() -> None:
    matrices = stacks(query_matrices="per_head")
    assert matrices["layers.1.attn.wq_b.weight"] == (H, K, Q)
    assert matrices["layers.1.attn.indexer.wq_b.weight"] == (I, J, Q)
    assert matrices["layers.1.attn.wq_a.weight"] == (1, Q, D)


@pytest.mark.parametrize(
    "name", ["layers.0.attn.wq_c.weight", "weight", "layers.0.ffn.gate.bias", "x.norm.weight"]
)
def test_an_unknown_name_is_an_error(name: str) -> None:
    with pytest.raises(OptimError, match=name):
        build_table({name: (4, 4)}, FACTS, OptimConfig())


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("layers.0.attn.wo_a.weight", (G * O + 1, 8), "divisible by 2"),
        ("layers.1.attn.compressor.wkv.weight", (2 * K + 1, D), "divisible by 2"),
        ("layers.0.ffn.experts.w1", (E * F, D), "3 dims"),
        ("layers.0.attn.wkv.weight", (K,), "2 dims"),
    ],
)
def test_a_shape_that_does_not_fit(name: str, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(OptimError, match=reason) as caught:
        build_table({name: shape}, FACTS, OptimConfig())
    assert name in str(caught.value)


def test_the_table_prints() -> None:
    console = Console(width=200, record=True)
    table = build_table(shapes(), FACTS, OptimConfig())
    console.print(render_table(table))
    lines = console.export_text().splitlines()
    row = next(line for line in lines if "layers.*.ffn.experts.w2" in line)
    assert "muon" in row and "6x48x24" in row and row.rstrip(" │").endswith("3")
