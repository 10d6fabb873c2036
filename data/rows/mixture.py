"""How much of every source goes where: windows of a fixed number of rows, and the rows' order.

A window takes from every source the next run of its endless line of positions, in proportion to the
weights, so that what a window holds does not depend on an earlier one. In a window the rows are put
in an order that keeps every source's share: at the end of a step the running deviation from the
window's own shares is as small as the choice of two rows can make it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from data.config import DataConfig, DataPhase
from data.errors import DataError
from data.rows.permutation import hashes
from data.rows.stream import SourceStream

Ints = NDArray[np.int64]
_POOL = 256  # rows among which the next one is chosen
_RUN = 64  # rows after which shares are right to less than a row
_LEAST = 12  # the same where a step has fewer
_FEW = 3  # mixed rows in a run


@dataclass(frozen=True)
class WindowPlan:
    """Windows of `rows` rows; window k takes positions k·take[s] // parts … of source s."""

    rows: int
    take: tuple[int, ...]
    parts: int
    slack: int

    def end(self, source: int, row: int) -> int:
        """How many positions of a source the first `row` rows of a phase take."""
        return row * self.take[source] // (self.parts * self.rows)


def shares(
    sources: Sequence[SourceStream], weights: Mapping[str, float], growth: Sequence[float]
) -> list[float]:
    """Each source's share of the tokens. Raises DataError where one with weight has no document.

    `growth` is by how much the transforms lengthen each source; without weights: an epoch of all.
    """
    if not weights:
        sizes = [s.positions * g for s, g in zip(sources, growth, strict=True)]
    else:
        names = [source.name for source in sources]
        for name, weight in weights.items():
            if weight > 0 and name not in names:
                raise DataError(
                    f"the shards hold no document of source {name!r}, whose weight is {weight}; "
                    "run `v4 data prepare CONFIG` again, or set its weight to 0."
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
    """Windows of about `packing_window` documents, at most one epoch of the slowest source."""
    share = shares(sources, weights, growth)
    raw = [part / grown for part, grown in zip(share, growth, strict=True)]
    documents = sum(r * s.documents / s.positions for r, s in zip(raw, sources, strict=True))
    epoch = max(s.positions / r for r, s in zip(raw, sources, strict=True) if r > 0)
    parts = 1
    if weights:
        size = min(epoch, config.packing_window / documents)
        take = [round(size * r) for r in raw]
    else:
        parts = max(1, round(epoch * documents / config.packing_window))
        take = [source.positions for source in sources]
    tokens = sum(t * g for t, g in zip(take, growth, strict=True)) / parts
    rows = max(1, int(-(-tokens // (config.packing_fill * phase.seq_len))))
    slack = max(0, int(rows * phase.seq_len - tokens)) // (2 * len(sources))
    return WindowPlan(rows, tuple(take), parts, slack)


class Schedule:
    """Which phase a step belongs to, and which rows of the phase are the step's."""

    def __init__(self, phases: Sequence[DataPhase]) -> None:
        self.phases = tuple(phases)
        if any(phase.steps is None for phase in self.phases[:-1]):
            raise DataError("every phase but the last needs `steps`.")
        self._first = [0]
        for phase in self.phases[:-1]:
            self._first.append(self._first[-1] + (phase.steps or 0))

    def phase_of(self, step: int) -> int:
        """Index of the phase that a step belongs to; the last one goes on for ever."""
        return sum(first <= step for first in self._first) - 1

    def rows_of(self, step: int) -> tuple[int, range]:
        """The phase, and its rows by their number within the phase."""
        index = self.phase_of(step)
        phase, inside = self.phases[index], step - self._first[index]
        return index, range(phase.rows_before(inside), phase.rows_before(inside + 1))

    def rows_in(self, index: int) -> int | None:
        """Rows of a whole phase; None where it has no end."""
        if index == len(self.phases) - 1:
            return None
        return self.phases[index].rows_before(self.phases[index].steps or 0)


def balanced_order(tokens_RS: Ints, key: int, group: int, first: int = 0) -> Ints:
    """Rows in an order in which every source has its share all the time; empty rows come last.

    `tokens_RS` are the tokens of each source in each row; `first` is the number of the first row
    within the phase, from which groups of `group` rows are counted. Rows come in a random order
    (`key`), and the next one of a pool is the one that brings the running sums nearest to the
    shares of the whole. At every group's end (every few groups', where these are small), and every
    `_RUN` rows inside a group, the sums are set finely: of the rows that mix sources, which are
    dealt out evenly, two are chosen together for the end.
    """
    filled = tokens_RS.sum(axis=1)
    rows = np.flatnonzero(filled)
    rows = rows[np.argsort(hashes(rows, key), kind="stable")]
    if tokens_RS.shape[1] > 1 and len(rows):
        share = tokens_RS.sum(axis=0) / filled.sum()
        off = tokens_RS[rows] - filled[rows, None] * share
        mixed = ((tokens_RS[rows] > 0).sum(axis=1) > 1).astype(np.int64)
        group *= -(-_LEAST // group)
        if mixed.mean() * min(group, _RUN) < _FEW:
            mixed[:] = 0  # too few to be dealt out: all rows are alike
        rows = rows[_balance(off, mixed, group, first % group, _POOL)]
    return np.concatenate([rows, np.flatnonzero(filled == 0)])


@numba.njit(cache=True, nogil=True)
def _balance(off: NDArray[np.float64], kind: Ints, group: int, phase: int, size: int) -> Ints:
    """The order of rows; `kind` [R] is 1 for those that mix sources, `phase` the first's place."""
    rows = len(off)
    order = np.empty(rows, dtype=np.int64)
    queue = np.argsort(kind, kind="mergesort")  # those of one source, then the mixed
    total = np.array([rows - kind.sum(), kind.sum()])
    first = np.array([0, total[0]])
    following = np.minimum(total, size)  # into each queue
    pools = np.zeros((2, size), dtype=np.int64)
    held = following.copy()
    for k in range(2):
        pools[k, : held[k]] = queue[first[k] : first[k] + held[k]]
    # What a row of each kind brings in the mean: what the rest of a run is expected to bring.
    mean = np.zeros((2, off.shape[1]))
    for row in range(rows):
        mean[kind[row]] += off[row] / total[kind[row]]
    running, used, place = np.zeros(off.shape[1]), 0, 0
    while place < rows:
        inside = (place + phase) % group
        end = min(place - inside + min(inside // _RUN * _RUN + _RUN, group), rows)
        due = total[1] * end // rows - used  # mixed rows of this run that are still to come
        left = end - place
        pair = left == 2
        one = 1 if due > 2 or due >= left else 0
        two = 1 if due > 0 else 0
        best, chosen_one, chosen_two = np.inf, 0, 0
        if one and left > due > 2:
            chosen_one = place % held[1]  # unchosen, so that the pool keeps rows of all sorts
        else:
            for i in range(held[one]):
                for j in range(held[two] if pair else 1):
                    if pair and one == two and i <= j:
                        continue
                    norm = 0.0
                    for s in range(off.shape[1]):
                        value = running[s] + off[pools[one, i], s]
                        if pair:
                            value += off[pools[two, j], s]
                        else:
                            rest = due - one
                            value += (left - 1 - rest) * mean[0, s] + rest * mean[1, s]
                        norm += value * value
                    if norm < best:
                        best, chosen_one, chosen_two = norm, i, j
        for c in range(2 if pair else 1):
            k, at = (one, chosen_one) if c == 0 else (two, chosen_two)  # the higher place first
            row = pools[k, at]
            order[place] = row
            running += off[row]
            used += k
            place += 1
            if following[k] < total[k]:
                pools[k, at] = queue[first[k] + following[k]]
                following[k] += 1
            else:
                held[k] -= 1
                pools[k, at] = pools[k, held[k]]
    return order
