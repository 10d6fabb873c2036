"""Who updates what: parameters that the same ranks hold, divided over them. Imports no torch.

The ranks that hold the same part of some parameters are their owners. A Muon matrix has one owner,
since Newton–Schulz needs it whole; what AdamW has is divided element by element. Flat pieces of all
parameters stand in one buffer, [owner 0 | owner 1 | ...], each owner's part padded to the largest:

    owner 0 | wo_b of layer 1 | gate of layer 0 | some of AdamW's elements |     |
    owner 1 | wo_b of layer 0 | wkv of layer 0  | some of AdamW's elements | pad |

AdamW's elements fill up what matrices leave free. Where the matrices are so few that the padding
would still be large, fewer ranks own them, and the others repeat the update (report, hybrid ZeRO).
In each part the last layers come first, since backward reaches them first.

Where other ranks split the matrices themselves (tensor, expert_tensor), every one of them holds its
part of the same buffer, and each matrix has a home: the one of them that makes it whole.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field
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
    def last(self) -> int:
        """Where it ends in the owner's part of the buffer."""
        return self.position + self.size

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


def plan_owners(
    parameters: Sequence[Held], ranks: int, homes: int, config: MuonConfig, padding: float
) -> Layout:
    """The layout for the most owners, of those that divide `ranks`, with no more padding.

    `padding` is over what the buffer holds; one owner needs none.
    """
    elements = [unit.size for held in parameters for unit in _units(held, config)]
    others = sum(math.prod(h.local) for h in parameters if h.entry.matrices is None)
    limit = (1.0 + padding) * (sum(elements) + others)
    for owners in range(ranks, 1, -1):
        if ranks % owners or owners * max(elements, default=0) > limit:
            continue
        layout = plan_layout(parameters, owners, homes, config)
        if owners * layout.part <= limit + owners:  # elements need not divide
            return layout
    return plan_layout(parameters, 1, homes, config)


def plan_layout(parameters: Sequence[Held], owners: int, homes: int, config: MuonConfig) -> Layout:
    """The same layout on every rank, from the same parameters in the same order.

    Equal matrices, as experts are, are dealt out in their order. Others go one by one, the most
    costly first, to the owner whose fullest share of costs or of elements grows least by it.
    """
    units = [unit for held in parameters for unit in _units(held, config)]
    bins = _deal(units, owners, homes)
    place = {held.entry.name: number for number, held in enumerate(parameters)}
    order = sorted(
        range(len(units)),
        key=lambda i: (bins[i], -place[units[i].held.entry.name], units[i].index),
    )
    pieces: list[Piece] = []
    fill = [0] * owners
    for index in order:
        owner, home = bins[index]
        _append(pieces, units[index], owner, home, fill)
    flat = [held for held in reversed(parameters) if held.entry.matrices is None]
    pieces += _elementwise(flat, fill)
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
        return _deal_alike(units, owners, homes)
    # No division makes the fullest share of costs smaller than this; a little more may be needed.
    mean_cost = sum(u.cost for u in units) / (owners * homes)
    least_cost = 1.1 * max(mean_cost, *(unit.cost for unit in units))
    mean_size = sum(u.size for u in units) / owners
    cost = [[0] * homes for _ in range(owners)]
    size = [0] * owners
    found: dict[int, tuple[int, int]] = {}

    def fullest(owner: int, unit: _Unit) -> tuple[float, float, int]:
        busy = min(cost[owner]) if unit.held.joined else max(cost[owner])
        load = (busy + unit.cost) / least_cost
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


def _deal_alike(units: list[_Unit], owners: int, homes: int) -> list[tuple[int, int]]:
    """Of every parameter a run of matrices to each; what is left goes on from one to the next."""
    if not units:
        return []
    joined = units[0].held.joined
    each = homes if joined else 1
    bins, turn = owners * each, 0
    places: list[int] = []
    for count in Counter(unit.held.entry.name for unit in units).values():
        whole, rest = divmod(count, bins)
        extra = {(turn + number) % bins for number in range(rest)}
        for place in range(bins):
            places += [place] * (whole + (place in extra))
        turn += rest
    return [(place // each, place % each if joined else -1) for place in places]


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


def _elementwise(parameters: Sequence[Held], fill: list[int]) -> list[Piece]:
    """AdamW's parameters behind each other, cut into one run for each owner, who is filled up."""
    rooms = _rooms(fill, sum(math.prod(held.local) for held in parameters))
    pieces, owner = [], 0
    for held in parameters:
        size, start = math.prod(held.local), 0
        while start < size:
            while not rooms[owner]:
                owner += 1
            stop = min(size, start + rooms[owner])
            pieces.append(Piece(held.entry.name, start, stop, owner, fill[owner], None, None))
            rooms[owner] -= stop - start
            fill[owner] += stop - start
            start = stop
    return pieces


def _rooms(fill: Sequence[int], elements: int) -> list[int]:
    """How many of the elements each owner gets, so that the fullest is as empty as can be."""
    left, level, low = elements, 0, 0
    for low, height in enumerate(sorted(fill), start=1):
        level = height
        above = sorted(fill)[low] if low < len(fill) else math.inf
        if left <= (above - height) * low:
            break
        left -= int(above - height) * low
    whole, rest = divmod(left, low)
    rooms = [max(0, level + whole - height) for height in fill]
    for owner, height in enumerate(fill):
        if rest and height <= level:
            rooms[owner] += 1
            rest -= 1
    return rooms


@dataclass
class Load:
    """What one rank keeps and computes.

    Attributes:
        muon, adamw: elements that it keeps masters and states of.
        joined: those of `muon` whose matrices other ranks hold parts of.
        runs: runs of AdamW's elements.
        matrices, cost: matrices, and operations of Newton–Schulz for them in a step.
        buffer, used: elements of its parts of all buffers, and those that stand for something.
    """

    muon: int = 0
    adamw: int = 0
    joined: int = 0
    runs: int = 0
    matrices: int = 0
    cost: int = 0
    buffer: int = 0
    used: int = 0

    @property
    def state(self) -> int:
        """Bytes of fp32 masters and states: 8 an element for Muon, 12 for AdamW."""
        return 8 * self.muon + 12 * self.adamw

    def __add__(self, other: Load) -> Load:
        mine, theirs = astuple(self), astuple(other)
        return Load(*(a + b for a, b in zip(mine, theirs, strict=True)))

    def has(self, piece: Piece, config: MuonConfig) -> None:
        """Count the update of a piece."""
        if piece.matrices is None:
            self.adamw += piece.size
            self.runs += 1
            return
        count, rows, columns = piece.matrices
        self.muon += piece.state
        self.joined += 0 if piece.home is None else piece.state
        self.matrices += count
        self.cost += count * newton_schulz_cost(rows, columns, config)


def loads_of(layout: Layout, config: MuonConfig) -> list[list[Load]]:
    """By owner, then by its place among the homes, what it keeps and computes of a layout."""
    loads = [[Load(buffer=layout.part) for _ in range(layout.homes)] for _ in range(layout.owners)]
    for piece in layout.pieces:
        for home, load in enumerate(loads[piece.owner]):
            load.used += piece.size
            if piece.home in (None, home):
                load.has(piece, config)
    return loads


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
        least, mean, most = (size / 2**20 for size in self.state_spread)
        return (
            f"Optimizer state of a rank: {least:,.2f} MiB at least, {mean:,.2f} on average, "
            f"{most:,.2f} at most; buffers padded by {self.padding:.1%}; the largest "
            f"Newton–Schulz load is {self.newton_schulz_excess:.3f} of the mean."
        )

    def table(self) -> Table:
        """What ranks keep and compute: the least, the mean and the most."""
        view = Table(title="assignment of the optimizer, by rank", title_justify="left")
        for name in ("", "least", "mean", "most"):
            view.add_column(name, justify="right" if name else "left")
        for name, values in (
            ("matrices", [load.matrices for load in self.loads]),
            ("masters and states, MiB", [load.state / 2**20 for load in self.loads]),
            ("Newton–Schulz, GFLOP a step", [load.cost / 1e9 for load in self.loads]),
            ("its part of the buffers, M elements", [load.buffer / 1e6 for load in self.loads]),
        ):
            mean = sum(values) / len(values)
            view.add_row(name, *(f"{value:,.1f}" for value in (min(values), mean, max(values))))
        return view
