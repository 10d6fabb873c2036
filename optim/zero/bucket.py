"""One group of parameters on one rank: its masters, and the ways between them and the parameters.

Gradients go out and parameters come back in chunks of the layout's buffer; `optim.zero.send_queue` says
when.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from optim.rounding import round_stochastically
from optim.zero.assemble import Homes
from optim.zero.group import Group, StatePiece, Wait, check
from optim.zero.plan import Piece


@dataclass(frozen=True)
class Chunk:
    """Columns `first` to `last` of a bucket's buffer, and the pieces' elements that are there."""

    first: int
    last: int
    runs: tuple[tuple[Piece, int, int], ...]


class Bucket:
    """One group's layout, its masters, and the two ways between them and the parameters."""

    def __init__(self, number: int, group: Group, chunk_elements: int) -> None:
        self.number, self.group = number, group
        check(group)
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
        self.homes = Homes(group, own)
        self.places = {_key(piece): piece for piece in (*self.unjoined, *self.homes.here)}
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

    def _chunks(self, elements: int) -> list[Chunk]:
        width = min(max(1, elements // self.owners.size), max(1, self.layout.part))
        firsts = range(0, self.layout.part, width)
        runs: list[list[tuple[Piece, int, int]]] = [[] for _ in firsts]
        for piece in self.layout.pieces:
            for number in range(piece.position // width, (piece.last - 1) // width + 1):
                begin = max(number * width, piece.position) - piece.position
                end = min((number + 1) * width, piece.last) - piece.position
                runs[number].append((piece, begin, end))
        return [
            Chunk(first, min(first + width, self.layout.part), tuple(some))
            for first, some in zip(firsts, runs, strict=True)
        ]

    def state(self, kind: str, key: str, tensor: Tensor) -> StatePiece:
        """What stands in the place of a master."""
        piece = self.places[key]
        whole = piece.home is not None
        start = piece.start * piece.state // piece.size if whole else piece.start
        return StatePiece(kind, piece.name, tensor, start, whole)

    def begin(self, chunk: Chunk, seed: int) -> Wait:
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

    def _pack(self, chunk: Chunk) -> Tensor:
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

    def land(self, chunk: Chunk, row: Tensor) -> None:
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
        joined = self.homes.join(lambda piece: self._local(piece, given))
        for piece in self.unjoined:
            master = self.masters[_key(piece)]
            is_given = piece.name in given
            master.grad = self._local(piece, given).view(master.shape) if is_given else None
        for piece, whole in zip(self.homes.here, joined, strict=True):
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
        back = self.homes.split(lambda piece: self.masters[_key(piece)])
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
        before: tuple[Chunk, Wait] | None = None
        for chunk in (*self.chunks, None):
            wait = None if chunk is None else self.owners.all_gather(part[chunk.first : chunk.last])
            if before is not None:
                self._unpack(*before, parameters)
            before = None if chunk is None or wait is None else (chunk, wait)

    def _unpack(self, chunk: Chunk, wait: Wait, parameters: Mapping[str, Tensor]) -> None:
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
        whole = self.homes.join(lambda piece: run(piece).float())
        found |= {_key(p): tensor for p, tensor in zip(self.homes.here, whole, strict=True)}
        return found

    def _of(self, part: Tensor, piece: Piece) -> Tensor:
        return part[piece.position : piece.last]


def _key(piece: Piece) -> str:
    return f"{piece.name}@{piece.start}"
