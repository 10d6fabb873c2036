"""Who updates what: parameters that the same ranks hold, divided over them. Imports no torch.

The ranks that hold the same part of some parameters are their owners. A Muon matrix has one owner,
since Newton–Schulz needs it whole; what AdamW has is divided element by element. Flat pieces of all
parameters stand in one buffer, [owner 0 | owner 1 | ...], each owner's part padded to the largest:

    owner 0 | wo_b of layer 0 | gate of layer 3 | 1/n of AdamW's |      |
    owner 1 | wo_b of layer 1 | wkv of layer 2  | 1/n of AdamW's | pad  |

Where other ranks split the matrices themselves (tensor, expert_tensor), every one of them holds its
part of the same buffer, and each matrix has a home: the one of them that makes it whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from rich.table import Table

from optim.config import MuonConfig
from optim.partition import Assignment, Shape


@dataclass(frozen=True)
class Held:
    """A parameter as a rank holds it.

    Attributes:
        entry: its line of the optimizer's table.
        local: shape of the part that is here.
        joined: whether other ranks hold other parts of each matrix.
    """

    entry: Assignment
    local: Shape
    joined: bool = False

    @property
    def count(self) -> int:
        """Matrices, or parts of matrices, that are here."""
        assert self.entry.matrices is not None
        whole, rows, columns = self.entry.matrices
        if self.joined:
            return whole
        return math.prod(self.local) // (rows * columns)


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` (excluded) of a parameter's flattened local part, at one owner.

    Attributes:
        position: where it begins in the owner's part of the buffer.
        home: the rank that makes the matrices whole, or None where nothing is to be joined.
        matrices: (N, R, C) of the whole matrices; None for AdamW.
    """

    name: str
    start: int
    stop: int
    owner: int
    position: int
    home: int | None
    matrices: tuple[int, int, int] | None

    @property
    def size(self) -> int:
        """Elements that are here."""
        return self.stop - self.start

    @property
    def count(self) -> int:
        """Matrices; 1 for AdamW."""
        return 1 if self.matrices is None else self.matrices[0]

    @property
    def state(self) -> int:
        """Elements of the whole matrices, for which the owner keeps state."""
        return self.size if self.matrices is None else math.prod(self.matrices)


@dataclass(frozen=True)
class Layout:
    """All pieces, in the order of the buffer; `part` elements for each of `owners`."""

    owners: int
    homes: int
    part: int
    pieces: tuple[Piece, ...]

    @property
    def padding(self) -> float:
        """Elements of the buffer that stand for nothing, over those that stand for something."""
        used = sum(piece.size for piece in self.pieces)
        return self.owners * self.part / used - 1.0 if used else 0.0


def newton_schulz_cost(rows: int, columns: int, config: MuonConfig) -> int:
    """Operations of one matrix: two products with the wide one and one of Gram matrices a step.

    Iterating on the Gram matrix (`gram`) takes fewer, which is not counted.
    """
    short, long = sorted((rows, columns))
    steps = config.coarse_steps + config.fine_steps
    if config.newton_schulz == "polar_express":
        steps = config.polar_express_steps
    return steps * (4 * short**2 * long + 2 * short**3)


@dataclass(frozen=True)
class _Unit:
    held: Held
    index: int
    size: int
    cost: int


def plan_layout(parameters: Sequence[Held], owners: int, homes: int, config: MuonConfig) -> Layout:
    """The same layout on every rank, from the same parameters in the same order.

    Equal matrices, as experts are, are dealt out in their order. Others go one by one, the most
    costly first, to the owner whose fullest share of costs or of elements grows least by it.
    """
    units = [unit for held in parameters for unit in _units(held, config)]
    bins = _deal(units, owners, homes)
    pieces: list[Piece] = []
    fill = [0] * owners
    for (owner, home), index in sorted(zip(bins, range(len(units)), strict=True)):
        _append(pieces, units[index], owner, home, fill)
    pieces += _elementwise([h for h in parameters if h.entry.matrices is None], owners, fill)
    pieces.sort(key=lambda piece: (piece.owner, piece.position))
    return Layout(owners, homes, max(fill, default=0), tuple(pieces))


def _units(held: Held, config: MuonConfig) -> Iterable[_Unit]:
    if held.entry.matrices is None:
        return
    _, rows, columns = held.entry.matrices
    count = held.count
    size = math.prod(held.local) // count
    for index in range(count):
        yield _Unit(held, index, size, newton_schulz_cost(rows, columns, config))


def _deal(units: list[_Unit], owners: int, homes: int) -> list[tuple[int, int]]:
    """(owner, home) of every unit; home is -1 where nothing is joined."""
    alike = len({(unit.cost, unit.size, unit.held.joined) for unit in units}) <= 1
    if alike:
        each = homes if units and units[0].held.joined else 1
        places = [index * owners * each // len(units) for index in range(len(units))]
        return [(p // each, p % each if units[0].held.joined else -1) for p in places]
    mean_cost = sum(u.cost for u in units) / (owners * homes)
    mean_size = sum(u.size for u in units) / owners
    cost = [[0] * homes for _ in range(owners)]
    size = [0] * owners
    found: dict[int, tuple[int, int]] = {}

    def fullest(owner: int, unit: _Unit) -> tuple[float, float, int]:
        busy = min(cost[owner]) if unit.held.joined else max(cost[owner])
        load = (busy + unit.cost) / mean_cost
        room = (size[owner] + unit.size) / mean_size
        return max(load, room), load + room, owner

    # What every home has to do comes before what one of them does.
    for index in sorted(
        range(len(units)), key=lambda i: (units[i].held.joined, -units[i].cost, -units[i].size, i)
    ):
        unit = units[index]
        owner = min(range(owners), key=partial(fullest, unit=unit))
        home = cost[owner].index(min(cost[owner])) if unit.held.joined else -1
        size[owner] += unit.size
        for place in range(homes) if home < 0 else [home]:
            cost[owner][place] += unit.cost
        found[index] = owner, home
    return [found[index] for index in range(len(units))]


def _append(pieces: list[Piece], unit: _Unit, owner: int, home: int, fill: list[int]) -> None:
    """Put a matrix behind the owner's others, joined to the last piece where it continues it."""
    assert unit.held.entry.matrices is not None
    _, rows, columns = unit.held.entry.matrices
    name, start = unit.held.entry.name, unit.index * unit.size
    count, position = 1, fill[owner]
    last = pieces[-1] if pieces else None
    home_or_none = None if home < 0 else home
    if (
        last is not None
        and (last.name, last.owner, last.home, last.stop) == (name, owner, home_or_none, start)
        and last.matrices is not None
    ):
        pieces.pop()
        start, count, position = last.start, last.matrices[0] + 1, last.position
    stop = (unit.index + 1) * unit.size
    matrices = (count, rows, columns)
    pieces.append(Piece(name, start, stop, owner, position, home_or_none, matrices))
    fill[owner] += unit.size


def _elementwise(parameters: Sequence[Held], owners: int, fill: list[int]) -> list[Piece]:
    """AdamW's parameters behind each other, cut into equal runs, one for each owner."""
    run = -(-sum(math.prod(held.local) for held in parameters) // owners)
    pieces, before = [], 0
    for held in parameters:
        size = math.prod(held.local)
        start = 0
        while start < size:
            owner = (before + start) // run
            stop = min(size, (owner + 1) * run - before)
            pieces.append(Piece(held.entry.name, start, stop, owner, fill[owner], None, None))
            fill[owner] += stop - start
            start = stop
        before += size
    return pieces


@dataclass
class Load:
    """What one rank keeps and computes.

    Attributes:
        state: bytes of fp32 masters and states (8 an element for Muon, 12 for AdamW).
        cost: operations of Newton–Schulz in a step.
        buffer, used: elements of its parts of all buffers, and those that stand for something.
    """

    state: int = 0
    cost: int = 0
    buffer: int = 0
    used: int = 0
    matrices: int = 0

    def add(self, layout: Layout, owner: int, home: int, config: MuonConfig) -> None:
        """Count what the owner has of a layout where it is the `home`-th to join matrices."""
        self.buffer += layout.part
        for piece in layout.pieces:
            if piece.owner != owner:
                continue
            self.used += piece.size
            if piece.home not in (None, home):
                continue
            self.state += piece.state * (12 if piece.matrices is None else 8)
            if piece.matrices is not None:
                count, rows, columns = piece.matrices
                self.matrices += count
                self.cost += count * newton_schulz_cost(rows, columns, config)


@dataclass(frozen=True)
class Summary:
    """Loads of all ranks together."""

    loads: list[Load] = field(default_factory=list)

    @property
    def padding(self) -> float:
        """Padding of all buffers over what is in them."""
        used = sum(load.used for load in self.loads)
        return sum(load.buffer for load in self.loads) / used - 1.0 if used else 0.0

    @property
    def state_spread(self) -> tuple[int, float, int]:
        """Least, mean and largest bytes of states on a rank."""
        states = [load.state for load in self.loads]
        return min(states), sum(states) / len(states), max(states)

    @property
    def newton_schulz_excess(self) -> float:
        """The largest load of Newton–Schulz over the mean."""
        costs = [load.cost for load in self.loads]
        return max(costs) * len(costs) / sum(costs) if sum(costs) else 1.0

    def words(self) -> str:
        """One sentence."""
        least, mean, most = self.state_spread
        gib = 2**30
        return (
            f"Optimizer state of a rank: {least / gib:.2f} GiB at least, {mean / gib:.2f} on "
            f"average, {most / gib:.2f} at most; buffers padded by {self.padding:.1%}; the largest "
            f"Newton–Schulz load is {self.newton_schulz_excess:.3f} of the mean."
        )

    def table(self) -> Table:
        """A line for each rank, ranks that are alike together."""
        view = Table(title="assignment of the optimizer", title_justify="left")
        for name in ("ranks", "matrices", "state, MiB", "Newton–Schulz, GFLOP", "padding"):
            view.add_column(name, justify="right")
        alike: dict[tuple[str, ...], list[int]] = {}
        for rank, load in enumerate(self.loads):
            line: tuple[str, ...] = (
                f"{load.matrices:,}",
                f"{load.state / 2**20:,.1f}",
                f"{load.cost / 1e9:,.0f}",
                f"{(load.buffer - load.used) / max(load.used, 1):.1%}",
            )
            alike.setdefault(line, []).append(rank)
        for line, ranks in alike.items():
            shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} and {len(ranks) - 1} alike"
            view.add_row(shown, *line)
        return view
