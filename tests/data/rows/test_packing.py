"""Best-fit packing: like a few lines of brute force, nothing lost, little cut."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.rows.packing import PackedRows, concatenate, pack, pack_into, pack_windows, pieces_of
from data.rows.permutation import shuffled


def brute_force(lengths: list[int], size: int) -> list[list[tuple[int, int, int]]]:
    """Best-fit decreasing; among rows with equal room, the one touched last."""
    pieces = [(d, s, min(size, n - s)) for d, n in enumerate(lengths) for s in range(0, n, size)]
    rows: list[list[tuple[int, int, int]]] = []
    room: list[int] = []
    touched: list[int] = []
    for time, piece in enumerate(sorted(pieces, key=lambda p: -p[2])):
        fitting = [r for r in range(len(rows)) if room[r] >= piece[2]]
        if not fitting:
            rows.append([])
            room.append(size)
            touched.append(time)
            fitting = [len(rows) - 1]
        best = min(fitting, key=lambda r: (room[r], -touched[r]))
        rows[best].append(piece)
        room[best] -= piece[2]
        touched[best] = time
    return rows


def as_lists(packed: PackedRows) -> list[list[tuple[int, int, int]]]:
    return [packed.row(i) for i in range(len(packed))]


def assert_whole(packed: PackedRows, lengths: np.ndarray, size: int) -> None:
    """Every position of every document once, no row over its size."""
    assert all(0 < sum(p[2] for p in row) <= size for row in as_lists(packed))
    covered = [
        (document, position)
        for row in as_lists(packed)
        for document, start, length in row
        for position in range(start, start + length)
    ]
    expected = [(d, p) for d, n in enumerate(lengths.tolist()) for p in range(n)]
    assert sorted(covered) == expected


@pytest.mark.parametrize("seed", range(40))
def test_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 40))
    lengths = rng.integers(0, 3 * size, int(rng.integers(1, 60)))
    packed = pack(lengths, size)
    assert as_lists(packed) == brute_force(lengths.tolist(), size)
    assert_whole(packed, lengths, size)


def test_windows_hold_every_position_once() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 50, 100)
    order = shuffled(100, 7)
    packed = pack_windows(lengths, 16, order, 30)
    assert_whole(packed, lengths, 16)
    first = set(order[:30].tolist())
    rows = as_lists(packed)
    crossing = [row for row in rows if len({piece[0] in first for piece in row}) == 2]
    assert not crossing
    assert as_lists(pack_windows(lengths, 16, order, 30)) == rows


def test_cuts_are_at_multiples_wherever_a_document_begins() -> None:
    rng = np.random.default_rng(2)
    first = rng.integers(0, 40, 30)
    last = first + rng.integers(1, 60, 30)
    expected = []
    for d in range(30):
        for _, group in itertools.groupby(range(first[d], last[d]), lambda p: p // 16):
            places = list(group)
            expected.append((d, places[0], len(places)))
    assert list(zip(*(c.tolist() for c in pieces_of(first, last, 16)), strict=True)) == expected


def test_cuts_fewer_documents_than_concatenation() -> None:
    rng = np.random.default_rng(1)
    size = 256
    lengths = np.minimum(rng.lognormal(4.5, 1.0, 3000).astype(np.int64) + 1, 2000)
    packed = pack(lengths, size)
    ends = np.cumsum(lengths)
    concatenated = int(((ends - 1) // size > (ends - lengths) // size).sum())
    cut = int((np.bincount(packed.document, minlength=len(lengths)) > 1).sum())
    assert cut == int((lengths > size).sum())
    assert cut < concatenated / 2
    assert lengths.sum() / (len(packed) * size) > 0.999


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 1000])
def test_permutation_is_one(count: int) -> None:
    assert sorted(shuffled(count, 5).tolist()) == list(range(count))


def test_permutations_differ_by_key() -> None:
    orders = {tuple(shuffled(50, key).tolist()) for key in range(20)}
    assert len(orders) == 20


def test_orders_never_change() -> None:
    """A change here would break the resumption of every run."""
    assert shuffled(8, 12345).tolist() == [0, 4, 2, 3, 5, 6, 1, 7]


@given(
    st.lists(st.integers(0, 100), min_size=1, max_size=80),
    st.integers(2, 40),
    st.integers(0, 5),
    st.booleans(),
)
@settings(deadline=None)
def test_any_lengths_into_fixed_rows(
    lengths: list[int], size: int, spare: int, together: bool
) -> None:
    """Both ways hold every position once; best fit cuts a short document only where it must."""
    sizes = np.array(lengths, dtype=np.int64)
    pieces = pieces_of(np.zeros_like(sizes), sizes, size)
    rows = -(-int(sizes.sum()) // size) + spare
    place = concatenate if together else pack_into
    packed = place(*pieces, size, rows)
    assert len(packed) == rows
    covered = [
        (document, position)
        for row in as_lists(packed)
        for document, start, length in row
        for position in range(start, start + length)
    ]
    assert sorted(covered) == [(d, p) for d, n in enumerate(lengths) for p in range(n)]
    assert all(sum(piece[2] for piece in row) <= size for row in as_lists(packed))
    if not together and rows >= len(pack(sizes, size)):
        cut = np.bincount(packed.document, minlength=len(sizes)) > 1
        assert (cut == (sizes > size)).all()


@given(st.lists(st.integers(0, 200), min_size=1, max_size=60), st.integers(2, 50))
@settings(deadline=None)
def test_any_lengths_like_brute_force(lengths: list[int], size: int) -> None:
    packed = pack(np.array(lengths, dtype=np.int64), size)
    assert as_lists(packed) == brute_force(lengths, size)
