"""One group of parameters on one rank: its fp32 masters, and the exchange with the parameters.

Gradients are sent and parameters return in chunks of the layout's buffer; `optim.zero.send_queue`
decides when.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from optim.partition import Assignment
from optim.zero.assemble import MatrixAssembler
from optim.zero.group import ParameterGroup, Pending, StateSlice, check
from optim.zero.plan import Layout, OwnedSlice


@dataclass(frozen=True)
class ChunkPart:
    """Elements `start` to `stop` of `owned` (counted from its own start) that a chunk covers."""

    owned: OwnedSlice
    start: int
    stop: int

    def in_parameter(self, flat: Tensor) -> Tensor:
        """These elements of the flattened parameter, as a view."""
        return flat[self.owned.start + self.start : self.owned.start + self.stop]

    def in_chunk(self, rows: Tensor, chunk: Chunk) -> Tensor:
        """These elements of a chunk [owners, elements], as a view."""
        offset = self.owned.offset - chunk.first
        return rows[self.owned.owner, offset + self.start : offset + self.stop]


@dataclass(frozen=True)
class Chunk:
    """Elements `first` to `last` (excluded) of every owner's partition, and what they hold."""

    first: int
    last: int
    parts: tuple[ChunkPart, ...]

    @property
    def names(self) -> set[str]:
        """Names of the parameters that it holds elements of."""
        return {part.owned.name for part in self.parts}


class Bucket:
    """One group's layout, its fp32 masters, and the collectives between masters and parameters.

    A bucket is a whole group; the unit of communication is a Chunk.

    Attributes:
        unsharded: owned slices whose matrices, if any, are not sharded.
        slices: everything that this rank updates, by the name of its master.
        masters: fp32 values of `slices`, of whole matrices even where ranks shard them; views of
            the parameters where these are fp32 and not sharded.
        table: the optimizer's assignment of each master.
        replica_count: ranks that make the same update.
    """

    def __init__(self, number: int, group: ParameterGroup, chunk_elements: int) -> None:
        self.number, self.group = number, group
        check(group)
        self.layout, self.owners = group.layout, group.owners
        first = next(iter(group.parameters.values()))
        self.dtype, self.device = first.dtype, first.device
        self.is_low = self.dtype != torch.float32
        self.replica_count = 1
        for ranks in group.replica_groups:
            self.replica_count *= ranks.size
        owned = [s for s in self.layout.slices if s.owner == group.owners.rank]
        self.unsharded = [s for s in owned if s.assembly_rank is None]
        self.assembler = MatrixAssembler(group, owned)
        self.slices = {_key(s): s for s in (*self.unsharded, *self.assembler.assembled)}
        self.chunks = cut_chunks(self.layout, chunk_elements) if group.owners.size > 1 else []
        self._reduced: Tensor | None = None
        """This owner's partition of the summed gradients, between `receive` and `finish_reduce`."""
        with torch.no_grad():
            self.masters = {key: Parameter(value) for key, value in self._read().items()}
        self.table = self._table()

    def _table(self) -> list[Assignment]:
        entries = {p.assignment.name: p.assignment for p in self.group.local_parameters}
        return [
            replace(
                entries[owned.name],
                name=key,
                shape=tuple(self.masters[key].shape),
                matrices=owned.matrices,
            )
            for key, owned in self.slices.items()
        ]

    def state_slice(self, kind: str, key: str, tensor: Tensor) -> StateSlice:
        """A tensor shaped as the master `key`, with its position in the parameter."""
        owned = self.slices[key]
        is_gathered = owned.assembly_rank is not None
        start = owned.start * owned.state_size // owned.size if is_gathered else owned.start
        return StateSlice(kind, owned.name, tensor, start, is_gathered)

    # reduce

    def start_reduce(self, chunk: Chunk, seed: int) -> Pending:
        """Sends a chunk of the gradients; the result is this owner's part of the sum, in fp32."""
        buffer = self._pack(chunk)
        precision = self.group.precision
        if precision == "fp32":
            return self.owners.reduce_scatter(buffer)
        seed = ((seed * 8191 + self.number) * 65_537 + chunk.first) * 65_537 + self.owners.rank
        rounded = buffer.bfloat16() if precision == "bf16" else round_stochastically(buffer, seed)
        sizes = [buffer.size(1)] * self.owners.size
        received = self.owners.all_to_all(rounded.view(-1), sizes, sizes)
        return lambda: received().view(self.owners.size, -1).sum(0, dtype=torch.float32)

    def _pack(self, chunk: Chunk) -> Tensor:
        """[owners, elements] of gradients; padding and missing gradients are zeros."""
        shape = (self.layout.owners, chunk.last - chunk.first)
        buffer = torch.zeros(shape, dtype=torch.float32, device=self.device)
        gradients = ((part, self.group.parameters[part.owned.name].grad) for part in chunk.parts)
        _copy_all(
            (part.in_chunk(buffer, chunk), part.in_parameter(gradient.reshape(-1)))
            for part, gradient in gradients
            if gradient is not None
        )
        return buffer

    def receive(self, chunk: Chunk, summed: Tensor) -> None:
        """Stores the result of `start_reduce`."""
        if self._reduced is None:
            self._reduced = self._new_partition(torch.float32)
        self._reduced[chunk.first : chunk.last] = summed.view(-1)

    def finish_reduce(self) -> None:
        """Sets `.grad` of every master, after all chunks have been received."""
        with_gradient = {n for n, p in self.group.parameters.items() if p.grad is not None}
        has_one_owner = not self.chunks
        if has_one_owner and with_gradient and self.replica_count > 1:
            partition = self._new_partition(torch.float32)
            _copy_all(
                (_in_partition(partition, owned), self._gradient_of(owned))
                for owned in self.layout.slices
            )
            self._reduced = partition
        for ranks in self.group.replica_groups:
            if self._reduced is not None:
                ranks.all_reduce_(self._reduced)
        assembled = self.assembler.gather(self._gradient_of)
        for owned in self.unsharded:
            master = self.masters[_key(owned)]
            has_gradient = owned.name in with_gradient
            master.grad = self._gradient_of(owned).view(master.shape) if has_gradient else None
        for owned, gradient in zip(self.assembler.assembled, assembled, strict=True):
            self.masters[_key(owned)].grad = gradient if owned.name in with_gradient else None
        self._reduced = None

    def _gradient_of(self, owned: OwnedSlice) -> Tensor:
        """The summed gradient of an owned slice, flat and in fp32; zeros where there is none.

        With one owner it is the parameter's own.
        """
        if self._reduced is not None:
            return _in_partition(self._reduced, owned)
        gradient = self.group.parameters[owned.name].grad
        if gradient is None:
            return torch.zeros(owned.size, dtype=torch.float32, device=self.device)
        return gradient.reshape(-1)[owned.start : owned.stop].float()

    # gather

    def gather(self) -> None:
        """Writes the parameters of all ranks from their owners' masters, in their precision."""
        parameters = {n: p.detach().view(-1) for n, p in self.group.parameters.items()}
        shards = self.assembler.scatter(lambda owned: self.masters[_key(owned)])
        masters = [(owned, self.masters[_key(owned)].flatten()) for owned in self.unsharded]
        if not self.chunks:
            # Masters of fp32 parameters are views of these.
            values = [*shards, *(masters if self.is_low else ())]
            _copy_all((parameters[o.name][o.start : o.stop], value) for o, value in values)
            return
        partition = self._new_partition(self.dtype)
        _copy_all((_in_partition(partition, o), value) for o, value in [*masters, *shards])
        self._all_gather(partition, parameters)

    def _all_gather(self, partition: Tensor, parameters: Mapping[str, Tensor]) -> None:
        """Gathers the partitions chunk by chunk, each in flight while the one before is copied."""
        previous: tuple[Chunk, Pending] | None = None
        for chunk in self.chunks:
            wait = self.owners.all_gather(partition[chunk.first : chunk.last])
            if previous is not None:
                self._unpack(*previous, parameters)
            previous = chunk, wait
        if previous is not None:
            self._unpack(*previous, parameters)

    def _unpack(self, chunk: Chunk, wait: Pending, parameters: Mapping[str, Tensor]) -> None:
        rows = wait().view(self.layout.owners, -1)
        _copy_all(
            (part.in_parameter(parameters[part.owned.name]), part.in_chunk(rows, chunk))
            for part in chunk.parts
        )

    # masters

    def read(self) -> None:
        """Sets the masters from the parameters."""
        for key, tensor in self._read().items():
            self.masters[key].copy_(tensor)

    def _read(self) -> dict[str, Tensor]:
        """fp32 values of all slices; views of fp32 parameters that are not sharded."""
        flat = {n: p.detach().view(-1) for n, p in self.group.parameters.items()}

        def values_of(owned: OwnedSlice) -> Tensor:
            return flat[owned.name][owned.start : owned.stop].float()

        values = {}
        for owned in self.unsharded:
            shape = owned.matrices or (owned.size,)
            values[_key(owned)] = values_of(owned).view(shape)
        gathered = self.assembler.gather(values_of)
        assembled = zip(self.assembler.assembled, gathered, strict=True)
        return values | {_key(owned): tensor for owned, tensor in assembled}

    def _new_partition(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.layout.partition_size, dtype=dtype, device=self.device)


def cut_chunks(layout: Layout, elements: int) -> list[Chunk]:
    """Cuts the buffer into chunks of at most `elements` over all owners."""
    width = min(max(1, elements // layout.owners), max(1, layout.partition_size))
    firsts = range(0, layout.partition_size, width)
    parts: list[list[ChunkPart]] = [[] for _ in firsts]
    for owned in layout.slices:
        for number in range(owned.offset // width, (owned.end - 1) // width + 1):
            start = max(number * width, owned.offset) - owned.offset
            stop = min((number + 1) * width, owned.end) - owned.offset
            parts[number].append(ChunkPart(owned, start, stop))
    return [
        Chunk(first, min(first + width, layout.partition_size), tuple(some))
        for first, some in zip(firsts, parts, strict=True)
    ]


def round_stochastically(tensor: Tensor, seed: int) -> Tensor:
    """Rounds fp32 to bf16, up or down with the probabilities that keep the mean. NaN stays NaN.

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


def _copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copies into the first tensor of each pair from the second, in few launches."""
    targets, sources = [], []
    for target, source in pairs:
        targets.append(target)
        sources.append(source)
    if targets:
        torch._foreach_copy_(targets, sources)


def _in_partition(partition: Tensor, owned: OwnedSlice) -> Tensor:
    return partition[owned.offset : owned.end]


def _key(owned: OwnedSlice) -> str:
    return f"{owned.name}@{owned.start}"
