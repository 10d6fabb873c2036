"""Muon and AdamW with states divided over the ranks that hold the same parameters.

A step has three phases, each for every group of parameters that the same ranks hold:
  reduce   gradients go out once: chunk by chunk into the layout of `optim.zero_plan`, summed and
           scattered to the owners. Parts of matrices that other ranks split go on to their home.
  update   every owner runs `optim.optimizer` on its own matrices and runs of elements: momentum,
           Newton–Schulz once for every matrix, AdamW; all in fp32.
  gather   parameters come back once: parts to the ranks that split them, then from every owner to
           all. They are rounded to their precision before.

fp32 masters and states are at the owner alone. With one owner it is the same path, and the
communication does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from optim.config import OptimConfig
from optim.errors import OptimError
from optim.optimizer import Optimizer
from optim.partition import Assignment
from optim.zero_plan import Held, Layout, Piece, plan_layout

CHUNK_ELEMENTS = 32 * 1024 * 1024  # 128 MiB of fp32: long enough to use the links fully
Precision = Literal["fp32", "bf16", "bf16_stochastic"]


class Ranks(Protocol):
    """Ranks that exchange tensors; over one rank every method returns what it is given."""

    @property
    def rank(self) -> int:
        """This rank's number among them."""

    @property
    def size(self) -> int:
        """How many there are."""

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all, in place."""

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """This rank's share along dim 0 of the sum over all."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor behind each other along dim 0."""

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """The first send[0] elements to rank 0, and so on; receive[r] come from rank r."""


@dataclass(frozen=True)
class Group:
    """Parameters of one precision that the same ranks hold.

    Attributes:
        parameters: by name; with shapes as in `held`.
        held: how this rank holds them, in an order that all its ranks share.
        owners: the ranks that hold the same parts, over which gradients are summed.
        homes: the ranks that hold other parts of the same matrices.
        tied: ranks that hold the same parameters besides, each with owners of its own.
        split_dim: by name of a joined parameter, the dimension that `homes` split.
        precision: what gradients are sent in.
    """

    parameters: Mapping[str, Parameter]
    held: Sequence[Held]
    owners: Ranks
    homes: Ranks
    tied: Ranks | None = None
    split_dim: Mapping[str, int] | None = None
    precision: Precision = "fp32"


@dataclass(frozen=True)
class StatePiece:
    """A state of some elements of a parameter.

    Attributes:
        kind: `master`, `momentum`, `exp_avg`, `exp_avg_sq` or `step` (one number).
        name: of the parameter.
        tensor: the live state.
        start: first element of the parameter's flattened local part; of the whole matrices, where
            `whole`.
        whole: whether it has the whole of matrices of which the parameter here has a part.
    """

    kind: str
    name: str
    tensor: Tensor
    start: int
    whole: bool


class HybridZero:
    """Updates the parameters of all `groups` in place as `table` says.

    All ranks call every method together. A parameter whose gradient is None is left alone; which
    these are must be the same on all ranks. Raises OptimError where groups and table do not fit.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        config: OptimConfig,
        seed: int = 0,
        chunk_elements: int = CHUNK_ELEMENTS,
    ) -> None:
        self.config = config
        self.seed = seed
        self.buckets = [_Bucket(group, config, chunk_elements) for group in groups if group.held]
        owned: dict[str, Parameter] = {}
        table: list[Assignment] = []
        for bucket in self.buckets:
            owned |= bucket.masters
            table += bucket.table
        self._owned = owned
        self._inner = Optimizer(owned, table, config)

    @property
    def step_count(self) -> int:
        """Steps so far."""
        return self._inner.step_count

    @step_count.setter
    def step_count(self, count: int) -> None:
        self._inner.step_count = count

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum every parameter's `.grad` over the ranks that hold it, at the owner of each piece."""
        for number, bucket in enumerate(self.buckets):
            rank = bucket.group.owners.rank
            seed = ((self.seed * 1_000_003 + self.step_count) * 8191 + number) * 65_537 + rank
            bucket.reduce(seed)

    def norm_square(self) -> Tensor:
        """This rank's part of the squared norm of all gradients: to be summed over all ranks.

        0-dim fp64. Every element is counted once over all ranks, after `reduce`.
        """
        total = torch.zeros((), dtype=torch.float64)
        for bucket in self.buckets:
            copies = 1 if bucket.group.tied is None else bucket.group.tied.size
            for master in bucket.masters.values():
                if master.grad is not None:
                    total = total.to(master.device)
                    norm = torch.linalg.vector_norm(master.grad, dtype=torch.float64)
                    total += norm.square() / copies
        return total

    def gradients(self) -> list[Parameter]:
        """The fp32 pieces that this rank owns, whose `.grad` `reduce` has set; for clipping."""
        return list(self._owned.values())

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update at `learning_rate` from what `reduce` left, and the gathered parameters."""
        self._inner.step(learning_rate)
        for master in self._owned.values():
            master.grad = None
        self.write_parameters()

    @torch.no_grad()
    def write_parameters(self) -> None:
        """Round the masters into the parameters of all ranks."""
        for bucket in self.buckets:
            bucket.gather()

    @torch.no_grad()
    def read_parameters(self) -> None:
        """Take the masters anew from the parameters, after weights were loaded into the model."""
        for bucket in self.buckets:
            bucket.read()

    def states(self) -> Iterator[StatePiece]:
        """Everything that a resume needs of this rank, as live tensors.

        A master that shares its parameter's storage, or that equals it, is not among them. To
        restore, copy into them; then call `read_parameters()` where parameters are fp32 and
        `write_parameters()`.
        """
        where = {key: value for bucket in self.buckets for key, value in bucket.places.items()}
        low = {key for bucket in self.buckets if bucket.is_low for key in bucket.masters}
        tensors = self._inner.state_tensors()
        for key in low:
            tensors[f"master.{key}"] = self._owned[key].detach()
        for label, tensor in tensors.items():
            kind, _, key = label.partition(".")
            piece = where[key]
            whole = piece.home is not None
            start = piece.start * piece.state // piece.size if whole else piece.start
            yield StatePiece(kind, piece.name, tensor, start, whole)


class _Bucket:
    """One group's layout, its masters, and the two ways between them and the parameters."""

    def __init__(self, group: Group, config: OptimConfig, chunk_elements: int) -> None:
        self.group = group
        _check(group)
        self.layout: Layout = plan_layout(
            group.held, group.owners.size, group.homes.size, config.muon
        )
        first = next(iter(group.parameters.values()))
        self.dtype, self.device = first.dtype, first.device
        self.is_low = self.dtype != torch.float32
        self.chunk = min(max(1, chunk_elements // group.owners.size), max(1, self.layout.part))
        own = [piece for piece in self.layout.pieces if piece.owner == group.owners.rank]
        self.unjoined = [piece for piece in own if piece.home is None]
        # Parts of matrices to be joined, by the home that they go to.
        self.by_home = [
            [piece for piece in own if piece.home == home] for home in range(group.homes.size)
        ]
        self.joined = self.by_home[group.homes.rank] if group.homes.size else []
        self.places = {_key(piece): piece for piece in (*self.unjoined, *self.joined)}
        self.masters: dict[str, Parameter] = {}
        with torch.no_grad():
            for key, tensor in self._own_masters().items():
                self.masters[key] = Parameter(tensor)
        entries = {held.entry.name: held.entry for held in group.held}
        self.table = [
            replace(
                entries[piece.name],
                name=key,
                shape=tuple(self.masters[key].shape),
                matrices=piece.matrices,
            )
            for key, piece in self.places.items()
        ]

    def reduce(self, seed: int) -> None:
        """`.grad` of every master; see HybridZero.reduce."""
        given = {n: p.grad for n, p in self.group.parameters.items() if p.grad is not None}
        part = torch.empty(self.layout.part, dtype=torch.float32, device=self.device)
        for number, (first, last) in enumerate(self._chunks()):
            buffer = self._pack(given, first, last, torch.float32)
            part[first:last] = self._summed(buffer, seed * 65_537 + number)
        if self.group.tied is not None:
            self.group.tied.sum_(part)
        for piece in self.unjoined:
            if piece.name in given:
                master = self.masters[_key(piece)]
                master.grad = self._of(part, piece).view(master.shape)
        mine = self._join([[self._of(part, piece) for piece in home] for home in self.by_home])
        for piece, whole in zip(self.joined, mine, strict=True):
            if piece.name in given:
                self.masters[_key(piece)].grad = whole

    def _summed(self, buffer: Tensor, seed: int) -> Tensor:
        """This owner's row of the sum of all ranks' [owners, elements] buffers, in fp32."""
        owners = self.group.owners
        if self.group.precision == "fp32" or owners.size == 1:
            return owners.reduce_scatter(buffer).view(-1)
        if self.group.precision == "bf16":
            rounded = buffer.bfloat16()
        else:
            rounded = round_stochastically(buffer, seed)
        width = [buffer.size(1)] * owners.size
        received = owners.all_to_all(rounded.view(-1), width, width)
        return received.view(owners.size, -1).sum(0, dtype=torch.float32)

    def gather(self) -> None:
        """The parameters of all ranks from their owners' masters."""
        part = torch.zeros(self.layout.part, dtype=self.dtype, device=self.device)
        for piece in self.unjoined:
            self._of(part, piece).copy_(self.masters[_key(piece)].flatten())
        self._part_again(part)
        if self.group.owners.size == 1 and not self.is_low and not self.joined:
            return  # the masters are the parameters
        parameters = {n: p.detach().view(-1) for n, p in self.group.parameters.items()}
        for first, last in self._chunks():
            rows = self.group.owners.all_gather(part[first:last]).view(self.layout.owners, -1)
            for piece, begin, end in self._in_chunk(first, last):
                start = piece.position + begin - first
                run = rows[piece.owner, start : start + end - begin]
                parameters[piece.name][piece.start + begin : piece.start + end].copy_(run)

    def read(self) -> None:
        """The masters from the parameters."""
        for key, tensor in self._own_masters().items():
            self.masters[key].copy_(tensor)

    def _own_masters(self) -> dict[str, Tensor]:
        """fp32 values of all owned pieces; views of fp32 parameters that are not joined."""
        flat = {n: p.detach().view(-1) for n, p in self.group.parameters.items()}

        def run(piece: Piece) -> Tensor:
            return flat[piece.name][piece.start : piece.stop]

        found = {}
        for piece in self.unjoined:
            shape = piece.matrices or (piece.size,)
            found[_key(piece)] = run(piece).float().view(shape)
        whole = self._join([[run(piece).float() for piece in home] for home in self.by_home])
        found |= {_key(p): tensor for p, tensor in zip(self.joined, whole, strict=True)}
        return found

    def _join(self, parts: list[list[Tensor]]) -> list[Tensor]:
        """Whole [N, R, C] matrices at home here, from the flat parts of them on all ranks."""
        homes = self.group.homes
        if not any(self.by_home):
            return []
        sizes = [sum(piece.size for piece in pieces) for pieces in self.by_home]
        mine = sizes[homes.rank]
        sent = torch.cat([part for to in parts for part in to])
        rows = homes.all_to_all(sent, sizes, [mine] * homes.size).view(homes.size, -1)
        found, start = [], 0
        for piece in self.joined:
            run = rows[:, start : start + piece.size]
            start += piece.size
            found.append(torch.cat([self._shaped(piece, row) for row in run], self._dim(piece)))
        return found

    def _part_again(self, part: Tensor) -> None:
        """Write into an owner's part what the homes have made of the joined matrices."""
        homes = self.group.homes
        if not any(self.by_home):
            return
        sizes = [sum(piece.size for piece in pieces) for pieces in self.by_home]
        mine = sizes[homes.rank]
        sent = part.new_empty(homes.size, mine)
        start = 0
        for piece in self.joined:
            whole = self.masters[_key(piece)]
            for rank, share in enumerate(whole.chunk(homes.size, self._dim(piece))):
                self._shaped(piece, sent[rank, start : start + piece.size]).copy_(share)
            start += piece.size
        received = homes.all_to_all(sent.view(-1), [mine] * homes.size, sizes)
        start = 0
        for pieces in self.by_home:
            for piece in pieces:
                self._of(part, piece).copy_(received[start : start + piece.size])
                start += piece.size

    def _dim(self, piece: Piece) -> int:
        """Which dimension of [N, R, C] the homes split."""
        assert self.group.split_dim is not None
        dim = self.group.split_dim[piece.name]
        return dim - self.group.parameters[piece.name].dim() + 3

    def _shaped(self, piece: Piece, flat: Tensor) -> Tensor:
        """A flat part of some matrices as [N, R, C], one of the last two divided by the homes."""
        assert piece.matrices is not None
        shape = list(piece.matrices)
        shape[self._dim(piece)] //= self.group.homes.size
        return flat.view(shape)

    def _of(self, part: Tensor, piece: Piece) -> Tensor:
        return part[piece.position : piece.position + piece.size]

    def _chunks(self) -> Iterator[tuple[int, int]]:
        for first in range(0, self.layout.part, self.chunk):
            yield first, min(first + self.chunk, self.layout.part)

    def _in_chunk(self, first: int, last: int) -> Iterator[tuple[Piece, int, int]]:
        """Pieces with elements in these columns of the buffer, and which of their elements."""
        for piece in self.layout.pieces:
            begin = max(first - piece.position, 0)
            end = min(last - piece.position, piece.size)
            if begin < end:
                yield piece, begin, end

    def _pack(
        self, given: Mapping[str, Tensor], first: int, last: int, dtype: torch.dtype
    ) -> Tensor:
        """[owners, last - first]: a chunk of the buffer from gradients; zeros elsewhere."""
        shape = (self.layout.owners, last - first)
        buffer = torch.zeros(shape, dtype=dtype, device=self.device)
        flat = {name: gradient.reshape(-1) for name, gradient in given.items()}
        for piece, begin, end in self._in_chunk(first, last):
            if piece.name in flat:
                start = piece.position + begin - first
                run = flat[piece.name][piece.start + begin : piece.start + end]
                buffer[piece.owner, start : start + end - begin].copy_(run)
        return buffer


def round_stochastically(tensor: Tensor, seed: int) -> Tensor:
    """fp32 to bf16, up or down with the probability that keeps the mean. NaN stays NaN.

    Sixteen random bits are added to those that bf16 drops. The same seed gives the same bits.
    """
    generator = torch.Generator(tensor.device).manual_seed(seed % 2**63)
    bits = tensor.contiguous().view(torch.int32)
    noise = torch.randint(
        2**16, bits.shape, dtype=torch.int32, device=tensor.device, generator=generator
    )
    rounded = (bits + noise).bitwise_and(-(2**16)).view(torch.float32)
    return torch.where(tensor.isfinite(), rounded, tensor).bfloat16()


def _key(piece: Piece) -> str:
    return f"{piece.name}@{piece.start}"


def _check(group: Group) -> None:
    names = {held.entry.name for held in group.held}
    if names != set(group.parameters):
        odd = sorted(names ^ set(group.parameters))
        raise OptimError(
            f"these parameters are in a group or in its table, but not in both: {odd[:5]}"
        )
    if len({parameter.dtype for parameter in group.parameters.values()}) > 1:
        raise OptimError("a group of parameters has several precisions; each needs its own")
