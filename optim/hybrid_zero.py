"""Muon and AdamW with states divided over the ranks that hold the same parameters.

A step has three phases, each for every group of parameters that the same ranks hold:
  reduce   gradients go out once: chunk by chunk into the layout of `optim.zero_plan`, summed and
           scattered to the owners, each chunk as soon as backward has left its last gradient.
           Parts of matrices that other ranks split go on to their home.
  update   every owner runs `optim.optimizer` on its own matrices and runs of elements: momentum,
           Newton–Schulz once for every matrix, AdamW; all in fp32.
  gather   parameters come back once: parts to the ranks that split them, then from every owner to
           all, one chunk on the way while the one before is copied. They are rounded before.

fp32 masters and states are at the owner alone. With one owner it is the same path, and the
communication does nothing. Hybrid ZeRO is the V4 report's (arXiv 2606.19348, infrastructure).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from optim.config import OptimConfig
from optim.errors import OptimError
from optim.optimizer import Optimizer
from optim.partition import Assignment
from optim.zero_plan import Held, Layout, Piece

CHUNK_ELEMENTS = 32 * 1024 * 1024  # 128 MiB of fp32: long enough to use the links fully
Precision = Literal["fp32", "bf16", "bf16_stochastic"]
Wait = Callable[[], Tensor]
"""What a collective that has begun gives when it is called."""


class Ranks(Protocol):
    """Ranks that exchange tensors; over one rank every method gives what it is given."""

    @property
    def rank(self) -> int:
        """This rank's number among them."""

    @property
    def size(self) -> int:
        """How many there are."""

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all, in place."""

    def reduce_scatter(self, tensor: Tensor) -> Wait:
        """Begins: this rank's share along dim 0 of the sum over all."""

    def all_gather(self, tensor: Tensor) -> Wait:
        """Begins: every rank's tensor behind each other along dim 0."""

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Wait:
        """Begins: the first send[0] elements to rank 0, and so on; receive[r] come from rank r."""


@dataclass(frozen=True)
class Group:
    """Parameters of one precision that the same ranks hold.

    Attributes:
        parameters: by name; with shapes as in `held`.
        held: how this rank holds them, in an order that all its ranks share.
        layout: who owns what of them.
        owners: ranks that hold the same parts and own them together.
        homes: the ranks that hold other parts of the same matrices.
        copies: further ranks with owners of their own, over which gradients are summed, too, and
            who do the same update.
        split_dim: by name of a joined parameter, the dimension that `homes` split.
        precision: what gradients are sent in.
    """

    parameters: Mapping[str, Parameter]
    held: Sequence[Held]
    layout: Layout
    owners: Ranks
    homes: Ranks
    copies: Sequence[Ranks] = ()
    split_dim: Mapping[str, int] | None = None
    precision: Precision = "fp32"


@dataclass(frozen=True)
class StatePiece:
    """A state, or the gradient, of some elements of a parameter.

    Attributes:
        kind: `master`, `momentum`, `exp_avg`, `exp_avg_sq`, `step` (one number) or `gradient`.
        name: of the parameter.
        tensor: the live state.
        start: first element of the parameter's flattened local part; of the whole matrices, where
            `whole`.
        whole: whether it has the whole of matrices of which the parameter here has a part.
    """

    kind: str
    name: str
    tensor: Tensor
    start: int = 0
    whole: bool = False


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
        self.buckets = [
            _Bucket(number, group, chunk_elements)
            for number, group in enumerate(groups)
            if group.held
        ]
        owned: dict[str, Parameter] = {}
        table: list[Assignment] = []
        for bucket in self.buckets:
            owned |= bucket.masters
            table += bucket.table
        self._owned = owned
        self._inner = Optimizer(owned, table, config)
        self._line = _Line(self.buckets)

    @property
    def step_count(self) -> int:
        """Steps so far."""
        return self._inner.step_count

    @step_count.setter
    def step_count(self, count: int) -> None:
        self._inner.step_count = count

    @property
    def table(self) -> list[Assignment]:
        """What this rank owns."""
        return self._inner.table

    def expect(self, gradients: Mapping[str, int]) -> None:
        """Let `reduce` begin during backward.

        `gradients` says by name how often backward adds to a parameter's `.grad` at most; the chunk
        that it belongs to is sent once that has happened. What got fewer waits for `reduce`.
        """
        self._line.open(gradients, self._seed())

    def reduce(self) -> None:
        """Sum every parameter's `.grad` over the ranks that hold it, at the owner of each piece."""
        with torch.no_grad():
            self._line.finish(self._seed())

    def _seed(self) -> int:
        return self.seed * 1_000_003 + self.step_count

    def norm_square(self) -> Tensor:
        """This rank's part of the squared norm of all gradients: to be summed over all ranks.

        0-dim fp64. Every element is counted once over all ranks, after `reduce`.
        """
        total = torch.zeros((), dtype=torch.float64)
        for bucket in self.buckets:
            masters = [m for m in bucket.masters.values() if m.grad is not None]
            if masters:
                norms = [torch.linalg.vector_norm(m.grad, dtype=torch.float64) for m in masters]
                total = total.to(bucket.device)
                total += torch.stack(norms).square().sum() / bucket.copies
        return total

    def owned(self) -> list[Parameter]:
        """The fp32 pieces that this rank owns, whose `.grad` `reduce` has set; for clipping."""
        return list(self._owned.values())

    def gradients(self) -> Iterator[StatePiece]:
        """What `reduce` left here."""
        for bucket in self.buckets:
            for key, master in bucket.masters.items():
                if master.grad is not None:
                    yield bucket.state("gradient", key, master.grad)

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

        Masters of fp32 parameters are not among them. To restore, copy into them and into the
        fp32 parameters, then call `restored`.
        """
        where = {key: bucket for bucket in self.buckets for key in bucket.masters}
        tensors = self._inner.state_tensors()
        for key, bucket in where.items():
            if bucket.is_low:
                tensors[f"master.{key}"] = self._owned[key].detach()
        for label, tensor in tensors.items():
            kind, _, key = label.partition(".")
            yield where[key].state(kind, key, tensor)

    @torch.no_grad()
    def restored(self) -> None:
        """Bring masters and parameters together after `states` were copied into."""
        for bucket in self.buckets:
            if bucket.is_low:
                bucket.gather()
            else:
                bucket.read()


@dataclass(frozen=True)
class _Chunk:
    """Columns `first` to `last` of a bucket's buffer, and the pieces' elements that are there."""

    first: int
    last: int
    runs: tuple[tuple[Piece, int, int], ...]


class _Bucket:
    """One group's layout, its masters, and the two ways between them and the parameters."""

    def __init__(self, number: int, group: Group, chunk_elements: int) -> None:
        self.number, self.group = number, group
        _check(group)
        self.layout = group.layout
        self.owners = group.owners
        first = next(iter(group.parameters.values()))
        self.dtype, self.device = first.dtype, first.device
        self.is_low = self.dtype != torch.float32
        self.copies = 1
        for ranks in group.copies:
            self.copies *= ranks.size
        own = [piece for piece in self.layout.pieces if piece.owner == group.owners.rank]
        self.unjoined = [piece for piece in own if piece.home is None]
        # Parts of matrices to be joined, by the home that they go to.
        self.by_home = [
            [piece for piece in own if piece.home == home] for home in range(group.homes.size)
        ]
        self.joined = self.by_home[group.homes.rank]
        self.places = {_key(piece): piece for piece in (*self.unjoined, *self.joined)}
        self.chunks = self._chunks(chunk_elements) if group.owners.size > 1 else []
        self.part: Tensor | None = None
        with torch.no_grad():
            self.masters = {key: Parameter(value) for key, value in self._own_masters().items()}
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

    def _chunks(self, elements: int) -> list[_Chunk]:
        width = min(max(1, elements // self.owners.size), max(1, self.layout.part))
        firsts = range(0, self.layout.part, width)
        runs: list[list[tuple[Piece, int, int]]] = [[] for _ in firsts]
        for piece in self.layout.pieces:
            for number in range(piece.position // width, (piece.last - 1) // width + 1):
                begin = max(number * width, piece.position) - piece.position
                end = min((number + 1) * width, piece.last) - piece.position
                runs[number].append((piece, begin, end))
        return [
            _Chunk(first, min(first + width, self.layout.part), tuple(some))
            for first, some in zip(firsts, runs, strict=True)
        ]

    def state(self, kind: str, key: str, tensor: Tensor) -> StatePiece:
        """What stands in the place of a master."""
        piece = self.places[key]
        whole = piece.home is not None
        start = piece.start * piece.state // piece.size if whole else piece.start
        return StatePiece(kind, piece.name, tensor, start, whole)

    def begin(self, chunk: _Chunk, seed: int) -> Wait:
        """Send a chunk of the gradients; gives this owner's row of the sum, in fp32."""
        buffer = self._pack(chunk)
        precision = self.group.precision
        if precision == "fp32":
            return self.owners.reduce_scatter(buffer)
        seed = ((seed * 8191 + self.number) * 65_537 + chunk.first) * 65_537 + self.owners.rank
        rounded = buffer.bfloat16() if precision == "bf16" else round_stochastically(buffer, seed)
        width = [buffer.size(1)] * self.owners.size
        received = self.owners.all_to_all(rounded.view(-1), width, width)
        return lambda: received().view(self.owners.size, -1).sum(0, dtype=torch.float32)

    def _pack(self, chunk: _Chunk) -> Tensor:
        """[owners, elements]: a chunk of the buffer from gradients; zeros elsewhere."""
        shape = (self.layout.owners, chunk.last - chunk.first)
        buffer = torch.zeros(shape, dtype=torch.float32, device=self.device)
        for piece, begin, end in chunk.runs:
            gradient = self.group.parameters[piece.name].grad
            if gradient is not None:
                start = piece.position + begin - chunk.first
                run = gradient.reshape(-1)[piece.start + begin : piece.start + end]
                buffer[piece.owner, start : start + end - begin].copy_(run)
        return buffer

    def land(self, chunk: _Chunk, row: Tensor) -> None:
        """Take over what `begin` gave."""
        if self.part is None:
            self.part = torch.zeros(self.layout.part, dtype=torch.float32, device=self.device)
        self.part[chunk.first : chunk.last] = row.view(-1)

    def finish(self) -> None:
        """`.grad` of every master, after every chunk has landed."""
        given = {name for name, p in self.group.parameters.items() if p.grad is not None}
        if self.part is None and self.copies > 1:  # one owner, but others do the same
            part = torch.zeros(self.layout.part, dtype=torch.float32, device=self.device)
            for piece in self.layout.pieces:
                self._of(part, piece).copy_(self._local(piece, given))
            self.part = part
        for ranks in self.group.copies:
            if self.part is not None:
                ranks.sum_(self.part)
        mine = self._join([[self._local(piece, given) for piece in home] for home in self.by_home])
        for piece in self.unjoined:
            master = self.masters[_key(piece)]
            is_given = piece.name in given
            master.grad = self._local(piece, given).view(master.shape) if is_given else None
        for piece, whole in zip(self.joined, mine, strict=True):
            self.masters[_key(piece)].grad = whole if piece.name in given else None
        self.part = None

    def _local(self, piece: Piece, given: set[str]) -> Tensor:
        """The gradient of a piece that is owned here, flat and in fp32; zeros where there is none.

        With one owner it is the parameter's own.
        """
        if self.part is not None:
            return self._of(self.part, piece)
        gradient = self.group.parameters[piece.name].grad
        if piece.name not in given or gradient is None:
            return torch.zeros(piece.size, dtype=torch.float32, device=self.device)
        return gradient.reshape(-1)[piece.start : piece.stop].float()

    def gather(self) -> None:
        """The parameters of all ranks from their owners' masters."""
        parameters = {n: p.detach().view(-1) for n, p in self.group.parameters.items()}
        back = self._split_again()
        if not self.chunks:
            for piece, run in back:
                parameters[piece.name][piece.start : piece.stop].copy_(run)
            if self.is_low:  # else masters are the parameters
                for piece in self.unjoined:
                    run = self.masters[_key(piece)].flatten()
                    parameters[piece.name][piece.start : piece.stop].copy_(run)
            return
        part = torch.zeros(self.layout.part, dtype=self.dtype, device=self.device)
        for piece in self.unjoined:
            self._of(part, piece).copy_(self.masters[_key(piece)].flatten())
        for piece, run in back:
            self._of(part, piece).copy_(run)
        before: tuple[_Chunk, Wait] | None = None
        for chunk in (*self.chunks, None):
            wait = None if chunk is None else self.owners.all_gather(part[chunk.first : chunk.last])
            if before is not None:
                self._unpack(*before, parameters)
            before = None if chunk is None or wait is None else (chunk, wait)

    def _unpack(self, chunk: _Chunk, wait: Wait, parameters: Mapping[str, Tensor]) -> None:
        rows = wait().view(self.layout.owners, -1)
        for piece, begin, end in chunk.runs:
            start = piece.position + begin - chunk.first
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
        rows = homes.all_to_all(sent, sizes, [mine] * homes.size)().view(homes.size, -1)
        found, start = [], 0
        for piece in self.joined:
            run = rows[:, start : start + piece.size]
            start += piece.size
            found.append(torch.cat([self._shaped(piece, row) for row in run], self._dim(piece)))
        return found

    def _split_again(self) -> list[tuple[Piece, Tensor]]:
        """Flat parts, for the ranks here, of the matrices that all homes have made whole."""
        homes = self.group.homes
        if not any(self.by_home):
            return []
        sizes = [sum(piece.size for piece in pieces) for pieces in self.by_home]
        mine = sizes[homes.rank]
        sent = torch.empty(homes.size, mine, dtype=self.dtype, device=self.device)
        start = 0
        for piece in self.joined:
            whole = self.masters[_key(piece)]
            for rank, share in enumerate(whole.chunk(homes.size, self._dim(piece))):
                self._shaped(piece, sent[rank, start : start + piece.size]).copy_(share)
            start += piece.size
        received = homes.all_to_all(sent.view(-1), [mine] * homes.size, sizes)()
        found, start = [], 0
        for piece in (piece for pieces in self.by_home for piece in pieces):
            found.append((piece, received[start : start + piece.size]))
            start += piece.size
        return found

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
        return part[piece.position : piece.last]


class _Line:
    """The chunks of all buckets in the one order in which every rank sends them.

    Those that backward completes first come first. A chunk is sent when it is complete and all
    before it have been sent. Nothing waits here while backward goes on: other ranks may need this
    one's part of something else before they come as far.
    """

    def __init__(self, buckets: Sequence[_Bucket]) -> None:
        self.buckets = buckets
        self.chunks = [(bucket, chunk) for bucket in buckets for chunk in bucket.chunks]
        names = [name for bucket in buckets for name in bucket.group.parameters]
        place = {name: number for number, name in enumerate(sorted(names, key=_backward_order))}
        self.chunks.sort(key=lambda c: max((place[run[0].name] for run in c[1].runs), default=0))
        self.of: dict[str, list[int]] = {}
        for number, (_, chunk) in enumerate(self.chunks):
            for name in {run[0].name for run in chunk.runs}:
                self.of.setdefault(name, []).append(number)
        self._is_open, self._seed = False, 0
        self._left: dict[str, int] = {}
        self._missing: list[int] = []
        self._sent = 0
        self._flying: deque[tuple[_Bucket, _Chunk, Wait]] = deque()
        for bucket in buckets:
            for name, parameter in bucket.group.parameters.items():
                if name in self.of:
                    parameter.register_post_accumulate_grad_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        return lambda _: self._added(name)

    def open(self, gradients: Mapping[str, int], seed: int) -> None:
        """Send chunks as their gradients become complete."""
        self._left = {name: gradients[name] for name in self.of if gradients.get(name)}
        self._missing = [0] * len(self.chunks)
        for name in self._left:
            for number in self.of[name]:
                self._missing[number] += 1
        self._is_open, self._seed, self._sent = True, seed, 0

    def _added(self, name: str) -> None:
        if not self._is_open:
            return
        self._left[name] -= 1
        if self._left[name] == 0:
            for number in self.of[name]:
                self._missing[number] -= 1
            while self._sent < len(self.chunks) and not self._missing[self._sent]:
                with torch.no_grad():
                    self._send()

    def _send(self) -> None:
        bucket, chunk = self.chunks[self._sent]
        if any(bucket.group.parameters[run[0].name].grad is not None for run in chunk.runs):
            self._flying.append((bucket, chunk, bucket.begin(chunk, self._seed)))
        self._sent += 1

    def finish(self, seed: int) -> None:
        """Send what is left, and take over everything."""
        if not self._is_open:
            self._sent = 0
        self._is_open, self._seed = False, seed
        while self._sent < len(self.chunks) or self._flying:
            if self._sent < len(self.chunks):
                self._send()
            if len(self._flying) > 1 or (self._flying and self._sent == len(self.chunks)):
                bucket, chunk, wait = self._flying.popleft()
                bucket.land(chunk, wait())
        for bucket in self.buckets:
            bucket.finish()


def round_stochastically(tensor: Tensor, seed: int) -> Tensor:
    """fp32 to bf16, up or down with the probability that keeps the mean. NaN stays NaN.

    Sixteen random bits are added to those that bf16 drops. The same seed gives the same bits.
    """
    generator = None  # meta tensors have no values
    if not tensor.is_meta:
        generator = torch.Generator(tensor.device).manual_seed(seed % 2**63)
    bits = tensor.contiguous().view(torch.int32)
    noise = torch.randint(
        2**16, bits.shape, dtype=torch.int32, device=tensor.device, generator=generator
    )
    rounded = (bits + noise).bitwise_and(-(2**16)).view(torch.float32)
    return torch.where(tensor.isfinite(), rounded, tensor).bfloat16()


def _key(piece: Piece) -> str:
    return f"{piece.name}@{piece.start}"


def _backward_order(name: str) -> tuple[int, str]:
    """Heads first, then the layers from the last to the first, then the embedding."""
    if name.startswith("layers."):
        return -int(name.split(".")[1]), name
    return (1 if name == "embed.weight" else -(2**31)), name


def _check(group: Group) -> None:
    names = {held.entry.name for held in group.held}
    if names != set(group.parameters):
        odd = sorted(names ^ set(group.parameters))
        raise OptimError(
            f"these parameters are in a group or in its table, but not in both: {odd[:5]}"
        )
    if len({parameter.dtype for parameter in group.parameters.values()}) > 1:
        raise OptimError("a group of parameters has several precisions; each needs its own")
