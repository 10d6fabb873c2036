"""The mixture over made-up lengths, and the recipe as measured over the produced stream."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.config import DataConfig
from data.prepare.run import prepare
from data.rows.audit import audit_mixture
from data.rows.loader import Loader
from data.rows.mixture import balanced_order, plan_windows
from data.rows.stream import SourceStream
from data.rows.window import build_window
from tests.data.rows.made_up import documents_of


def rows_by_source(
    weights: list[float],
    means: list[float],
    seq_len: int,
    group: int,
    window: int,
    seed: int,
    documents: int = 2000,
) -> tuple[np.ndarray, np.ndarray]:
    """[rows, sources] tokens of three windows in their order, and the wanted shares."""
    rng = np.random.default_rng(seed)
    names = [f"s{i}" for i in range(len(weights))]
    sources = []
    for name, mean in zip(names, means, strict=True):
        lengths = np.maximum(2, rng.lognormal(np.log(mean), 1.0, documents)).astype(np.int32)
        sources.append(SourceStream(name, documents_of(lengths, "prose"), seed))
    config = DataConfig.model_validate(
        {
            "sources": [{"name": name, "paths": ["-"]} for name in names],
            "tokenizer": {"path": "-"},
            "shards": "-",
            "seq_len": seq_len,
            "global_batch_size": group,
            "packing_window": window,
            "source_weights": dict(zip(names, weights, strict=True)),
        }
    )
    phase = config.one_phase()
    plan = plan_windows(config, phase, sources, config.source_weights, [1.0] * len(names))
    tokens_by_row = []
    for number in range(3):
        first, last = number * plan.rows, (number + 1) * plan.rows
        parts = [
            (i, source, source.between(plan.end(i, first), plan.end(i, last)))
            for i, source in enumerate(sources)
        ]
        counts = [None] * len(names)
        window = build_window(
            parts, counts, None, seq_len, plan.rows, "best_fit", number, group, first
        )
        tokens = np.zeros((plan.rows, len(names)), dtype=np.int64)
        row_of = np.repeat(np.arange(plan.rows), np.diff(window.packed.offsets))
        np.add.at(tokens, (row_of, window.source[window.packed.document]), window.packed.length)
        assert sorted(window.order) == list(range(plan.rows))
        tokens_by_row.append(tokens[window.order])
    return np.concatenate(tokens_by_row), np.array(weights) / sum(weights)


@given(
    weights=st.lists(st.floats(0.05, 1.0), min_size=2, max_size=4),
    means=st.lists(st.floats(5.0, 80.0), min_size=4, max_size=4),
    group=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_run_of_steps_has_the_shares(
    weights: list[float], means: list[float], group: int, seed: int
) -> None:
    """To a few rows, with few rows to choose from, wherever windows end."""
    seq_len = 128
    tokens, expected = rows_by_source(weights, means[: len(weights)], seq_len, group, 800, seed)
    off = np.cumsum(tokens - tokens.sum(axis=1, keepdims=True) * expected, axis=0)
    period = group * -(-12 // group)
    ends = off[period - 1 :: period]
    assert np.ptp(ends, axis=0).max() <= 4 * seq_len
    again, _ = rows_by_source(weights, means[: len(weights)], seq_len, group, 800, seed)
    assert (again == tokens).all()


def test_a_million_tokens_have_the_shares_to_a_thousandth() -> None:
    tokens, expected = rows_by_source([0.5, 0.3, 0.2], [400, 250, 600], 1024, 64, 6000, 0, 20_000)
    steps = tokens[: len(tokens) // 64 * 64].reshape(-1, 64, 3).sum(axis=1)
    run = -(-1_000_000 // steps.sum(axis=1).min())
    ends = np.concatenate([np.zeros((1, 3)), steps.cumsum(axis=0)])
    runs = ends[run:] - ends[:-run]
    assert len(runs) > 20
    assert np.abs(runs / runs.sum(axis=1, keepdims=True) - expected).max() < 1e-3


@given(
    rows=st.lists(st.tuples(*[st.integers(0, 50)] * 3), max_size=60),
    key=st.integers(0, 9),
    group=st.integers(1, 20),
)
@settings(deadline=None)
def test_an_order_holds_every_row_once(rows: list[tuple[int, ...]], key: int, group: int) -> None:
    tokens = np.array(rows, dtype=np.int64).reshape(-1, 3)
    order = balanced_order(tokens, key, group)
    assert sorted(order) == list(range(len(rows)))
    filled = tokens[order].sum(axis=1) > 0
    assert (np.diff(filled.astype(int)) <= 0).all()  # empty rows last


@pytest.fixture(scope="module")
def mixed(
    config: DataConfig, documents: list[str], tmp_path_factory: pytest.TempPathFactory
) -> DataConfig:
    folder = tmp_path_factory.mktemp("measured")
    sources = []
    for name, texts in (("code", documents[:-200]), ("prose", documents[-200:])):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        sources.append({"name": name, "paths": [str(folder / f"{name}.jsonl")], "domain": name})
    fields = {
        "sources": sources,
        "shards": str(folder / "shards"),
        "validation_fraction": 0.0,
        "seq_len": 2048,
        "source_weights": {"code": 0.6, "prose": 0.4},
        "transforms": {
            "fim_rate": 0.4,
            "fim_domains": ["code", "prose"],
            "punctuation_split_rate": 0.3,
        },
    }
    variant = DataConfig.model_validate(config.model_dump() | fields)
    prepare(variant, progress=False)
    return variant


def test_measured_is_what_windows_decided(mixed: DataConfig) -> None:
    """The tokens have the shares that their windows planned."""
    loader = Loader(mixed, seed=2)
    steps = 3
    audit = audit_mixture(loader, steps)
    fim, splits, able, begun = dict.fromkeys(("code", "prose"), 0), 0, 0, 0
    for step in range(steps):
        for place in range(mixed.global_batch_size):
            at = loader.packed_row(step, place)
            assert at is not None
            window, row = at
            for which, start, length in window.packed.row(row):
                name = loader.sources[window.source[which]].name
                fim[name] += start == 0 and bool(window.fim[which])
                begun += start == 0
                source = loader.sources[window.source[which]]
                raw = source.tokens_of(int(window.document[which]))
                extra = int(window.splits[which]) + 3 * bool(window.fim[which])
                if start == 0 and length == len(raw) - 1 + extra:
                    splits += int(window.splits[which])
                    able += int((loader.split_table[raw, 0] >= 0).sum())
    counted = audit.sources
    assert {name: c.fim for name, c in counted.items()} == fim
    assert sum(c.documents for c in counted.values()) == begun
    assert sum(c.split for c in counted.values()) == splits > 0
    assert sum(c.splittable for c in counted.values()) == able
    assert audit.shares == pytest.approx({"code": 0.6, "prose": 0.4})
    assert audit.tokens == sum(c.tokens for c in counted.values())
    share = counted["code"].tokens / audit.tokens
    assert audit.max_deviation["code"] >= abs(share - 0.6) - 1e-12
    plain = audit_mixture(Loader(mixed.model_copy(update={"source_weights": {}}), seed=2), 1)
    assert sum(plain.shares.values()) == pytest.approx(1.0)
