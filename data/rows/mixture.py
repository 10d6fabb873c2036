"""The mixture of sources: windows of a fixed number of rows, and the order of their rows.

A window takes from every source the next interval of its infinite stream of positions, in
proportion to the weights, so that what a window contains does not depend on an earlier one. Within
a window the rows are ordered so that every source keeps its share: at the end of every group of
`global_batch_size` rows, a step unless the phase has a ramp, the running deviation from the
window's shares is as small as the choice of two rows can make it.

Letters: R rows of a window, N sources.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.compiled import compiled
from data.config import DataConfig, DataPhase
from data.errors import DataError
from data.rows.permutation import hashes
from data.rows.stream import SourceStream

Ints = NDArray[np.int64]
_POOL = 256  # candidate rows for the next place
_RUN = 64  # rows after which shares are balanced to less than a row
_MIN_GROUP = 12  # smaller groups are joined into groups of at least as many rows
_MIN_TAKE = 50  # positions of a source in a window: rounding them moves no share by over a percent
_MIN_MIXED = 3  # mixed rows per run, below which they are not spread evenly


@dataclass(frozen=True)
class WindowPlan:
    """Windows of `rows` rows.

    Attributes:
        take, parts: `parts` consecutive windows take `take[s]` positions of source s.
        slack: positions by which the start of an interval may move to the start of a piece.
    """

    rows: int
    take: tuple[int, ...]
    parts: int
    slack: int

    def end(self, source: int, row: int) -> int:
        """Positions of a source that the first `row` rows of a phase take."""
        return row * self.take[source] // (self.parts * self.rows)


def shares(
    sources: Sequence[SourceStream], weights: Mapping[str, float], growth: Sequence[float]
) -> list[float]:
    """Each source's share of the tokens. Raises DataError where one with weight has no document.

    `growth` is the factor by which the transforms lengthen each source. Without weights, one epoch
    of the mixture is one epoch of every source.
    """
    if not weights:
        sizes = [s.positions * g for s, g in zip(sources, growth, strict=True)]
    else:
        names = [source.name for source in sources]
        for name, weight in weights.items():
            if weight > 0 and name not in names:
                raise DataError(
                    f"the shards hold no document of source {name!r}, whose weight is {weight}; "
                    "run `v4 data prepare CONFIG` again or set its weight to 0."
                )
        sizes = [weights.get(name, 0.0) for name in names]
    return [size / sum(sizes) for size in sizes]


def plan_windows(
    config: DataConfig,
    phase: DataPhase,
    sources: Sequence[SourceStream],
    weights: Mapping[str, float],
    growth: Sequence[float],
) -> WindowPlan:
    """Windows of about `packing_window` documents, at most one epoch of the slowest source.

    With weights a window is larger where the smallest share would be rounded away.
    """
    by_source = shares(sources, weights, growth)
    raw = [share / factor for share, factor in zip(by_source, growth, strict=True)]
    documents = sum(r * s.documents / s.positions for r, s in zip(raw, sources, strict=True))
    epoch = max(s.positions / r for r, s in zip(raw, sources, strict=True) if r > 0)
    parts = 1
    if weights:
        exact = _MIN_TAKE / min(r for r in raw if r > 0)
        size = min(epoch, max(config.packing_window / documents, exact))
        take = [round(size * r) for r in raw]
    else:
        parts = max(1, round(epoch * documents / config.packing_window))
        take = [source.positions for source in sources]
    tokens = sum(t * g for t, g in zip(take, growth, strict=True)) / parts
    rows = max(1, int(-(-tokens // (config.packing_fill * phase.seq_len))))
    slack = max(0, int(rows * phase.seq_len - tokens)) // (2 * len(sources))
    return WindowPlan(rows, tuple(take), parts, slack)


class Schedule:
    """Assigns to each step its phase and its rows within the phase.

    With a `start` (step, row), that step of its phase begins with that row; earlier steps have no
    rows.
    """

    def __init__(self, phases: Sequence[DataPhase], start: tuple[int, int] = (0, 0)) -> None:
        self.phases = tuple(phases)
        if any(phase.steps is None for phase in self.phases[:-1]):
            raise DataError("every phase but the last needs `steps`.")
        self._first = [0]
        for phase in self.phases[:-1]:
            self._first.append(self._first[-1] + (phase.steps or 0))
        self._start, row = start
        self.first_phase = self.phase_of(self._start)
        local = self._start - self._first[self.first_phase]
        self._shift = row - self.phases[self.first_phase].rows_before(local)

    def phase_of(self, step: int) -> int:
        """Index of the phase that a step belongs to; the last one continues indefinitely."""
        return sum(first <= step for first in self._first) - 1

    def rows_of(self, step: int) -> tuple[int, range]:
        """(phase index, row numbers within the phase) of a step."""
        if step < self._start:
            raise DataError(
                f"step {step} cannot be trained again: the data changed at step {self._start}, "
                "and the rows of earlier steps are those of another config."
            )
        index = self.phase_of(step)
        phase, local = self.phases[index], step - self._first[index]
        shift = self._shift if index == self.first_phase else 0
        return index, range(shift + phase.rows_before(local), shift + phase.rows_before(local + 1))

    def rows_in(self, index: int) -> int | None:
        """Rows of a whole phase; None where it has no end."""
        if index == len(self.phases) - 1:
            return None
        shift = self._shift if index == self.first_phase else 0
        return shift + self.phases[index].rows_before(self.phases[index].steps or 0)


def balanced_order(tokens_RN: Ints, key: int, group: int, first: int = 0) -> Ints:
    """An order of rows [R] in which every source keeps its share throughout; empty rows come last.

    Rows enter a pool in random order, and the next row is the one of the pool that brings the
    running sums closest to the shares of the whole. At the end of every group (of every few groups,
    where these are small), and every `_RUN` rows inside one, the sums are adjusted finely: rows
    that mix sources are spread evenly over the runs, and the last two of a run are chosen jointly.

    Arguments:
        tokens_RN: tokens of each source in each row.
        key: of the random order.
        group: rows of a group, the phase's `global_batch_size`.
        first: number of the first row within the phase, from which groups are counted.
    """
    filled = tokens_RN.sum(axis=1)
    rows = np.flatnonzero(filled)
    rows = rows[np.argsort(hashes(rows, key), kind="stable")]
    if tokens_RN.shape[1] > 1 and len(rows):
        share = tokens_RN.sum(axis=0) / filled.sum()
        deviation_RN = tokens_RN[rows] - filled[rows, None] * share
        mixed = ((tokens_RN[rows] > 0).sum(axis=1) > 1).astype(np.int64)
        group *= -(-_MIN_GROUP // group)
        if mixed.mean() * min(group, _RUN) < _MIN_MIXED:
            mixed[:] = 0  # too few to spread: all rows count as one kind
        rows = rows[_balance(deviation_RN, mixed, group, first % group, _POOL)]
    return np.concatenate([rows, np.flatnonzero(filled == 0)])


@compiled
def _balance(
    deviation_RN: NDArray[np.float64], kind: Ints, group: int, first_place: int, size: int
) -> Ints:
    """The order of rows [R], chosen from pools of up to `size` rows.

    `kind` [R] is 1 for rows that mix sources and 0 for others; `first_place` is the place of the
    first row in its group.
    """
    rows, sources = deviation_RN.shape
    order = np.empty(rows, dtype=np.int64)
    queue = np.argsort(kind, kind="mergesort")  # rows of one source, then mixed rows
    total = np.array([rows - kind.sum(), kind.sum()])
    first = np.array([0, total[0]])
    taken = np.minimum(total, size)  # rows of each queue that have entered its pool
    pools = np.zeros((2, size), dtype=np.int64)
    filled = taken.copy()
    for k in range(2):
        pools[k, : filled[k]] = queue[first[k] : first[k] + filled[k]]
    # The mean deviation of each kind predicts the rest of a run.
    mean = np.zeros((2, sources))
    for row in range(rows):
        mean[kind[row]] += deviation_RN[row] / total[kind[row]]
    running, mixed_placed, place = np.zeros(sources), 0, 0
    while place < rows:
        offset = (place + first_place) % group
        end = min(place - offset + min(offset // _RUN * _RUN + _RUN, group), rows)
        mixed_left = total[1] * end // rows - mixed_placed  # mixed rows still to place in this run
        left = end - place
        pair = left == 2
        one = 1 if mixed_left > 2 or mixed_left >= left else 0
        two = 1 if mixed_left > 0 else 0
        best, chosen_one, chosen_two = np.inf, 0, 0
        if one and left > mixed_left > 2:
            chosen_one = place % filled[1]  # arbitrary, so that the pool keeps rows of all shares
        else:
            for i in range(filled[one]):
                for j in range(filled[two] if pair else 1):
                    if pair and one == two and i <= j:
                        continue
                    norm = 0.0
                    for s in range(sources):
                        value = running[s] + deviation_RN[pools[one, i], s]
                        if pair:
                            value += deviation_RN[pools[two, j], s]
                        else:
                            rest = mixed_left - one
                            value += (left - 1 - rest) * mean[0, s] + rest * mean[1, s]
                        norm += value * value
                    if norm < best:
                        best, chosen_one, chosen_two = norm, i, j
        for c in range(2 if pair else 1):
            k, at = (one, chosen_one) if c == 0 else (two, chosen_two)  # the higher index first
            row = pools[k, at]
            order[place] = row
            running += deviation_RN[row]
            mixed_placed += k
            place += 1
            if taken[k] < total[k]:
                pools[k, at] = queue[first[k] + taken[k]]
                taken[k] += 1
            else:
                filled[k] -= 1
                pools[k, at] = pools[k, filled[k]]
    return order
