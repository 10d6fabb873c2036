"""Who updates what: assigns parameters to owners among the ranks that hold them. Imports no torch.

The algorithm (hybrid ZeRO, report §3.3), from names and shapes alone, so that every rank of a group
computes the same layout:

1. **Matrices.** A Muon matrix has one owner, since Newton–Schulz needs it whole. If all matrices
   of a group are equal, as experts' are, each owner gets contiguous runs of equal length. Otherwise
   all are bin-packed: the most expensive first, each to the owner whose larger load, of FLOPs or of
   elements, stays lowest.
2. **Elements.** AdamW's parameters are divided element by element, and fill the room that the
   matrices leave in the emptier owners.
3. **Buffer.** Each owner has a partition of one flat buffer, padded to the size of the largest, so
   that one reduce-scatter and one all-gather move everything. In each partition the last layers
   come first (within each assembly rank's matrices), since backward reaches them first:

       owner 0 | wo_b of layer 1 | gate of layer 0 | some of AdamW's elements |     |
       owner 1 | wo_b of layer 0 | wkv of layer 0  | some of AdamW's elements | pad |

4. **Number of owners.** Where matrices are so few that the padding would exceed its limit, fewer
   ranks own them, and the other ranks are replicas that repeat the same update.

Where tensor-parallel or expert-tensor-parallel ranks shard the matrices themselves, each of these
ranks holds its shard in the same buffer layout, and each matrix also has an assembly rank: the one
among them that gathers its shards and updates it.

Letters: N matrices, R rows, C columns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from optim.config import MuonConfig
from optim.partition import Assignment, Shape


@dataclass(frozen=True)
class LocalParameter:
    """A parameter as one rank holds it.

    Attributes:
        assignment: its line of the optimizer's table, with the shape of the unsharded matrices.
        shape: of the local tensor.
        is_sharded: whether other ranks hold other shards of each of its matrices.
    """

    assignment: Assignment
    shape: Shape
    is_sharded: bool = False

    @property
    def matrix_count(self) -> int:
        """Number of local matrices, or of local shards of matrices."""
        assert self.assignment.matrices is not None
        count, rows, columns = self.assignment.matrices
        if self.is_sharded:
            return count
        return math.prod(self.shape) // (rows * columns)


@dataclass(frozen=True)
class OwnedSlice:
    """Elements `start` to `stop` (excluded) of a flattened local parameter, all of one owner.

    Attributes:
        offset: of its first element in the owner's partition of the buffer.
        assembly_rank: the rank that gathers the matrices; None where they are not sharded.
        matrices: (N, R, C) of the unsharded matrices; None for AdamW.
    """

    name: str
    start: int
    stop: int
    owner: int
    offset: int
    assembly_rank: int | None
    matrices: tuple[int, int, int] | None

    @property
    def size(self) -> int:
        """Number of local elements."""
        return self.stop - self.start

    @property
    def end(self) -> int:
        """Offset of the first element after it in the owner's partition."""
        return self.offset + self.size

    @property
    def state_size(self) -> int:
        """Number of elements that its owner keeps state for: those of the unsharded matrices."""
        return self.size if self.matrices is None else math.prod(self.matrices)


@dataclass(frozen=True)
class Layout:
    """The buffer of one group of parameters: `owners` partitions of `partition_size` elements.

    Attributes:
        num_shard_ranks: number of ranks that shard the matrices.
        slices: in the order of the buffer.
    """

    owners: int
    num_shard_ranks: int
    partition_size: int
    slices: tuple[OwnedSlice, ...]

    @property
    def padding(self) -> float:
        """Padding of the buffer as a fraction of the elements that it holds."""
        used = sum(owned.size for owned in self.slices)
        return self.owners * self.partition_size / used - 1.0 if used else 0.0


def newton_schulz_flops(rows: int, columns: int, config: MuonConfig) -> int:
    """FLOPs of one matrix: per step two matmuls with the wide matrix and one of Gram matrices.

    Iterating on the Gram matrix (`gram`) takes fewer, which is not counted.
    """
    short, long = sorted((rows, columns))
    steps = config.coarse_steps + config.fine_steps
    if config.newton_schulz == "polar_express":
        steps = config.polar_express_steps
    return steps * (4 * short**2 * long + 2 * short**3)


def plan_owners(
    parameters: Sequence[LocalParameter],
    ranks: int,
    num_shard_ranks: int,
    config: MuonConfig,
    max_padding: float,
) -> Layout:
    """Returns the layout with the most owners whose padding is at most `max_padding`.

    The number of owners divides `ranks`. Padding is a fraction of the elements in the buffer; one
    owner needs none.
    """
    sizes = [matrix.size for p in parameters for matrix in _matrices_of(p, config)]
    adamw_elements = sum(math.prod(p.shape) for p in parameters if p.assignment.matrices is None)
    limit = (1.0 + max_padding) * (sum(sizes) + adamw_elements)
    for owners in range(ranks, 1, -1):
        if ranks % owners or owners * max(sizes, default=0) > limit:
            continue
        layout = plan_layout(parameters, owners, num_shard_ranks, config)
        if owners * layout.partition_size <= limit + owners:  # elements may not divide evenly
            return layout
    return plan_layout(parameters, 1, num_shard_ranks, config)


def plan_layout(
    parameters: Sequence[LocalParameter], owners: int, num_shard_ranks: int, config: MuonConfig
) -> Layout:
    """Returns the layout for this number of owners.

    It is the same on every rank that gives the same parameters in the same order.
    """
    matrices = [matrix for p in parameters for matrix in _matrices_of(p, config)]
    if len({(m.flops, m.size, m.parameter.is_sharded) for m in matrices}) <= 1:
        places = _divide_equal(matrices, owners, num_shard_ranks)
    else:
        places = _BinPacking(matrices, owners, num_shard_ranks).places()
    order = {p.assignment.name: number for number, p in enumerate(parameters)}
    # By owner and assembly rank, then the last layers first.
    packed = sorted(
        zip(places, matrices, strict=True),
        key=lambda item: (item[0], -order[item[1].parameter.assignment.name], item[1].index),
    )
    fill = [0] * owners
    slices: list[OwnedSlice] = []
    for (owner, assembly_rank), matrix in packed:
        _append(slices, matrix, owner, assembly_rank, fill)
    elementwise = [p for p in reversed(parameters) if p.assignment.matrices is None]
    slices += _fill_up(elementwise, fill)
    slices.sort(key=lambda owned: (owned.owner, owned.offset))
    return Layout(owners, num_shard_ranks, max(fill, default=0), tuple(slices))


@dataclass(frozen=True)
class _Matrix:
    """One matrix of a local parameter: number `index` of its stack, `size` local elements."""

    parameter: LocalParameter
    index: int
    size: int
    flops: int


_Place = tuple[int, int]
"""Owner and assembly rank of a matrix; the assembly rank is -1 where it is not sharded."""


def _matrices_of(parameter: LocalParameter, config: MuonConfig) -> Iterator[_Matrix]:
    if parameter.assignment.matrices is None:
        return
    _, rows, columns = parameter.assignment.matrices
    count = parameter.matrix_count
    size = math.prod(parameter.shape) // count
    for index in range(count):
        yield _Matrix(parameter, index, size, newton_schulz_flops(rows, columns, config))


def _divide_equal(matrices: Sequence[_Matrix], owners: int, num_shard_ranks: int) -> list[_Place]:
    """Divides the equal matrices of each parameter into contiguous runs, one for each bin.

    A bin is an owner, or an owner and assembly rank. Remainders are dealt round-robin:
    those of a parameter begin at the bin after the last one that got an extra matrix.
    """
    if not matrices:
        return []
    is_sharded = matrices[0].parameter.is_sharded
    bins_per_owner = num_shard_ranks if is_sharded else 1
    bins = owners * bins_per_owner
    first_extra = 0
    assigned: list[int] = []
    for count in Counter(m.parameter.assignment.name for m in matrices).values():
        run, remainder = divmod(count, bins)
        extra = {(first_extra + number) % bins for number in range(remainder)}
        for number in range(bins):
            assigned += [number] * (run + (number in extra))
        first_extra += remainder
    return [
        (number // bins_per_owner, number % bins_per_owner if is_sharded else -1)
        for number in assigned
    ]


class _BinPacking:
    """Greedy bin packing of different matrices by two loads at once: FLOPs and elements.

    The bins are the owners. FLOPs are counted for each owner and assembly rank. A matrix that is
    not sharded is a different one on every shard rank, so each of the owner's assembly ranks
    updates one; a sharded matrix is assembled and updated by the least loaded of them.
    """

    def __init__(self, matrices: Sequence[_Matrix], owners: int, num_shard_ranks: int) -> None:
        self.matrices = matrices
        self.flops = [[0] * num_shard_ranks for _ in range(owners)]
        self.size = [0] * owners
        mean_flops = sum(m.flops for m in matrices) / (owners * num_shard_ranks)
        # Without the factor, a lower bound on the largest load of any packing; 1.1 leaves room.
        self.flops_target = 1.1 * max(mean_flops, *(m.flops for m in matrices))
        self.size_target = sum(m.size for m in matrices) / owners

    def places(self) -> list[_Place]:
        """Assigns every matrix, in the order of `matrices`."""
        places: dict[int, _Place] = {}
        for index in self._order():
            matrix = self.matrices[index]
            owner = min(range(len(self.size)), key=partial(self._load_with, matrix))
            flops = self.flops[owner]
            assembly_rank = flops.index(min(flops)) if matrix.parameter.is_sharded else -1
            self.size[owner] += matrix.size
            for rank in range(len(flops)) if assembly_rank < 0 else [assembly_rank]:
                flops[rank] += matrix.flops
            places[index] = owner, assembly_rank
        return [places[index] for index in range(len(self.matrices))]

    def _order(self) -> list[int]:
        """The most expensive first; those that load all assembly ranks before those of one."""

        def key(index: int) -> tuple[bool, int, int, int]:
            matrix = self.matrices[index]
            return matrix.parameter.is_sharded, -matrix.flops, -matrix.size, index

        return sorted(range(len(self.matrices)), key=key)

    def _load_with(self, matrix: _Matrix, owner: int) -> tuple[float, float, int]:
        """The owner's larger load, relative to its target, were the matrix assigned to it."""
        flops = self.flops[owner]
        busy = min(flops) if matrix.parameter.is_sharded else max(flops)
        flops_load = (busy + matrix.flops) / self.flops_target
        size_load = (self.size[owner] + matrix.size) / self.size_target
        return max(flops_load, size_load), flops_load + size_load, owner


def _append(
    slices: list[OwnedSlice], matrix: _Matrix, owner: int, assembly_rank: int, fill: list[int]
) -> None:
    """Appends a matrix to its owner's partition, as part of the last slice if it continues it."""
    assert matrix.parameter.assignment.matrices is not None
    _, rows, columns = matrix.parameter.assignment.matrices
    name, start = matrix.parameter.assignment.name, matrix.index * matrix.size
    count, offset = 1, fill[owner]
    rank_or_none = None if assembly_rank < 0 else assembly_rank
    last = slices[-1] if slices else None
    if (
        last is not None
        and (last.name, last.owner, last.assembly_rank, last.stop)
        == (name, owner, rank_or_none, start)
        and last.matrices is not None
    ):
        slices.pop()
        start, count, offset = last.start, last.matrices[0] + 1, last.offset
    stop = (matrix.index + 1) * matrix.size
    matrices = (count, rows, columns)
    slices.append(OwnedSlice(name, start, stop, owner, offset, rank_or_none, matrices))
    fill[owner] += matrix.size


def _fill_up(parameters: Sequence[LocalParameter], fill: list[int]) -> list[OwnedSlice]:
    """Cuts the concatenated parameters of AdamW into one run for each owner, up to its room."""
    room = _room(fill, sum(math.prod(p.shape) for p in parameters))
    slices, owner = [], 0
    for parameter in parameters:
        size, start = math.prod(parameter.shape), 0
        while start < size:
            while not room[owner]:
                owner += 1
            stop = min(size, start + room[owner])
            name = parameter.assignment.name
            slices.append(OwnedSlice(name, start, stop, owner, fill[owner], None, None))
            room[owner] -= stop - start
            fill[owner] += stop - start
            start = stop
    return slices


def _room(fill: Sequence[int], elements: int) -> list[int]:
    """How many of `elements` each owner takes, so that the largest partition is minimal.

    As water fills a vessel: the lowest owners rise to one level, together with the next lowest
    once they reach it, until all elements are placed.
    """
    heights = sorted(fill)
    remaining, level, count = elements, 0, 0
    for count, level in enumerate(heights, start=1):
        next_level = heights[count] if count < len(heights) else math.inf
        if remaining <= (next_level - level) * count:
            break
        remaining -= int(next_level - level) * count
    rise, remainder = divmod(remaining, count)
    room = [max(0, level + rise - height) for height in fill]
    for owner, height in enumerate(fill):
        if remainder and height <= level:
            room[owner] += 1
            remainder -= 1
    return room
