"""Groups by union-find and by rounds on disk are the connected components."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

import data.prepare.dedup.sequence
from data.config import FiltersConfig
from data.prepare.dedup import verdict_file
from data.prepare.dedup.comparing import CompareTask, add_edges
from data.prepare.dedup.components import GroupsTask, LargeStarTask, SmallStarTask, StarsTask
from data.prepare.dedup.plan import Plan, read_pairs
from data.prepare.dedup.scatter import Output, ScatterWriter, dedup_folder
from data.prepare.filters import NEAR
from data.prepare.signatures import SIGNATURE
from tests.data.prepare.dedup.made import preparation, run_stages, write_items

Ints = NDArray[np.int64]
COUNT = 600
PLAN = Plan(items="", documents=COUNT, memory=90 * 2048)  # ranges of 90 documents


def path(rng: np.random.Generator) -> Ints:
    """One long chain in random order: the most rounds."""
    order = rng.permutation(COUNT)
    return np.stack([order[1:], order[:-1]], axis=1)


def sparse(rng: np.random.Generator) -> Ints:
    """Groups of all sizes."""
    return rng.integers(0, COUNT, (COUNT // 2, 2))


def star(rng: np.random.Generator) -> Ints:
    """Most documents in one group, whose first one is in the middle of the others."""
    return np.stack([rng.integers(0, COUNT, 3 * COUNT), np.full(3 * COUNT, 300)], axis=1)


def rows(folder: Path, output: Output) -> Ints:
    parts = [read_pairs(folder, [output], part) for part in range(PLAN.ranges)]
    for number, part in enumerate(parts):
        assert (PLAN.range_of(part[:, 0]) == number).all()
    every = np.concatenate(parts)
    return every[np.lexsort(every.T[::-1])]


def expected(edges: Ints, min_size: int) -> Ints:
    matrix = coo_matrix((np.ones(len(edges)), edges.T), (COUNT, COUNT))
    _, group = connected_components(matrix, directed=False)
    _, first, sizes = np.unique(group, return_index=True, return_counts=True)
    first, sizes = first[group], sizes[group]
    document = np.flatnonzero((first != np.arange(COUNT)) & (sizes >= min_size))
    return np.stack([document, first[document]], axis=1)


@pytest.mark.parametrize("graph", [path, sparse, star])
@pytest.mark.parametrize("min_size", [2, 5])
def test_union_find_and_rounds_are_the_components(
    tmp_path: Path, graph: Callable[[np.random.Generator], Ints], min_size: int
) -> None:
    edges = np.sort(graph(np.random.default_rng(3)), axis=1)[:, ::-1]
    edges = edges[edges[:, 0] != edges[:, 1]]
    dedup_folder(tmp_path).mkdir()
    shared = {"name": "", "size": 0, "plan": PLAN}
    inputs = Output(stage="edges", count=2)
    for number, half in enumerate(np.array_split(edges, 2)):
        compare = CompareTask.model_construct(plan=PLAN, stage="edges", number=number)
        with ScatterWriter(compare.output(tmp_path), 2 * PLAN.ranges, PLAN.memory) as writer:
            add_edges(writer, compare, half)
    prepared = preparation(tmp_path, ())

    GroupsTask(**shared, stage="one", number=0, edges=inputs, min_size=min_size).write(prepared)
    reference = expected(edges, min_size)
    assert len(reference)
    np.testing.assert_array_equal(rows(tmp_path, Output(stage="one", count=1)), reference)

    changes, rounds = 1, 0
    while changes:
        changes, rounds = 0, rounds + 1
        for kind, stage in ((LargeStarTask, "large"), (SmallStarTask, "small")):
            output = Output(stage=f"{stage}-{rounds}", count=PLAN.ranges)
            for number in range(PLAN.ranges):
                kind(**shared, stage=output.stage, number=number, edges=inputs).write(prepared)
            inputs = output
            changes += output.totals(tmp_path)[1]
    assert rounds <= 12
    for number in range(PLAN.ranges):
        task = StarsTask(**shared, stage="s", number=number, edges=inputs, min_size=min_size)
        task.write(prepared)
    output = Output(stage="s", count=PLAN.ranges)
    np.testing.assert_array_equal(rows(tmp_path, output), reference)


def test_pairs_that_do_not_fit_are_grouped_in_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.prepare.dedup.sequence, "EDGE_BYTES", 1 << 40)
    rng = np.random.default_rng(0)
    records = np.zeros(200, dtype=SIGNATURE)
    records["near"] = rng.integers(0, 1 << 32, records["near"].shape, dtype=np.uint32)
    order = rng.permutation(len(records))
    for i, (one, other) in enumerate(pairwise(order)):  # a chain, each link an equal band
        band = slice(i % 16 * 8, i % 16 * 8 + 8)
        records["near"][one, band] = records["near"][other, band]
    items = write_items(tmp_path, records, [50])
    filters = FiltersConfig(
        exact_duplicates=False, near_duplicate_similarity=8 / 128, template_similarity=None
    )
    done = run_stages(tmp_path, items, filters, 30 * 2048, rng)
    names = {task.name for tasks in done for task in tasks}
    assert {"near-large-3-00000", "near-small-3-00000", "near-00006"} <= names
    verdicts = np.concatenate([np.load(verdict_file(item.name, tmp_path)) for item in items])
    assert not verdicts["reason"][0] and (verdicts["reason"][1:] == NEAR).all()
    assert (verdicts["item"][1:] == 0).all() and not verdicts["document"][1:].any()
