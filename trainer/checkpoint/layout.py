"""Which rank writes which boxes, into which files: one plan for all ranks.

The files are safetensors, each with the offsets of its boxes in the header as
torch.distributed.checkpoint (DCP) writes them, so that DCP's reader opens a checkpoint at any
topology. A box that several ranks hold is written once, by the rank that has the least to write so
far. DCP's own `save` is not used: it keeps a copy of every file in memory, reads the files again
for hashes, and its process beside training imports torch, needs a process group and outlives a
killed rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.checkpoint.logical_tensors import Boxes
from trainer.parallel.collectives import all_gather_objects
from trainer.parallel.grid import Axis
from trainer.parallel.placement import Shape

FILE_BYTES = 1 << 30
ALIGNMENT = 64
"""Of a file's data in memory. In bytes; tensors within a file are ordered by the size of their
elements, so each is aligned to it."""
_HEADER_ALIGNMENT = 8
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls them."""


@dataclass(frozen=True)
class Chunk:
    """A box as it is written: a contiguous block of the logical tensor `name`."""

    name: str
    offset: Shape
    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedFile:
    """A file that this rank writes: its chunks in order, one after another."""

    name: str
    chunks: tuple[Chunk, ...]
    header: str
    nbytes: int
    """Of the chunks, without the header."""


class WritePlanner:
    """Plans what each rank writes; again only where the boxes of some rank have changed."""

    def __init__(self, world: Axis) -> None:
        self.world = world
        self._digests: list[int] = []
        self._files: list[PlannedFile] = []

    def plan(self, boxes: Boxes) -> list[PlannedFile]:
        """Returns the files of this rank; every rank calls it with its boxes."""
        chunks = [
            Chunk(name, tuple(box.offset), tuple(box.tensor.shape), box.tensor.dtype)
            for name, some in boxes.items()
            for box in some
        ]
        digests = all_gather_objects(hash(tuple(chunks)), self.world)
        if digests != self._digests:
            of_ranks = [(c.name, c.offset, c.nbytes) for c in chunks]
            writers = divide_writes(all_gather_objects(of_ranks, self.world))
            own = [c for c in chunks if writers[c.name, c.offset] == self.world.rank]
            self._files = list(_files(own, self.world.rank))
            self._digests = digests
        return self._files


def divide_writes(held: list[list[tuple[str, Shape, int]]]) -> dict[tuple[str, Shape], int]:
    """Returns the rank that writes each chunk, so that ranks write similar amounts.

    Chunks that the fewest ranks hold come first, then the largest; each goes to the rank that has
    the least so far.

    Args:
        held: name, offset and bytes of the chunks that each rank holds, by rank.
    """
    holders: dict[tuple[str, Shape], list[int]] = {}
    sizes: dict[tuple[str, Shape], int] = {}
    for rank, chunks in enumerate(held):
        for name, offset, size in chunks:
            holders.setdefault((name, offset), []).append(rank)
            sizes[name, offset] = size
    load = [0] * len(held)
    writers = {}
    for key in sorted(holders, key=lambda key: (len(holders[key]), -sizes[key])):
        writers[key] = min(holders[key], key=load.__getitem__)
        load[writers[key]] += sizes[key]
    return writers


def _files(chunks: list[Chunk], rank: int) -> Iterator[PlannedFile]:
    """Divides a rank's chunks into files of at most FILE_BYTES, or of one chunk that is larger.

    Each goes into the first file that has room and no other chunk of its tensor.
    """
    files: list[list[Chunk]] = []
    names: list[set[str]] = []
    sizes: list[int] = []
    for chunk in chunks:
        fits = (
            number
            for number, size in enumerate(sizes)
            if size + chunk.nbytes <= FILE_BYTES and chunk.name not in names[number]
        )
        file = next(fits, len(files))
        if file == len(files):
            files.append([])
            names.append(set())
            sizes.append(0)
        files[file].append(chunk)
        names[file].add(chunk.name)
        sizes[file] += chunk.nbytes
    for number, (unordered, size) in enumerate(zip(files, sizes, strict=True), start=1):
        ordered = tuple(sorted(unordered, key=lambda chunk: -chunk.dtype.itemsize))
        # The names that DCP gives to the files of several ranks, with -of-00001 whatever they are.
        name = f"shard-{rank + 1:05d}-model-{number:05d}-of-00001.safetensors"
        yield PlannedFile(name, ordered, _header(ordered), size)


def _header(chunks: tuple[Chunk, ...]) -> str:
    """Returns the header of a file: where its tensors are, and DCP's offsets of the boxes."""
    offsets = {chunk.name: {"saved_offsets": list(chunk.offset)} for chunk in chunks}
    document: dict[str, object] = {
        "__metadata__": {
            "DCP_SHARDING_INFO": json.dumps(offsets),
            "DCP_VERSION": "1.0",
            "format": "pt",
        }
    }
    at = 0
    for chunk in chunks:
        document[chunk.name] = {
            "dtype": _DTYPES[chunk.dtype],
            "shape": list(chunk.shape),
            "data_offsets": [at, at + chunk.nbytes],
        }
        at += chunk.nbytes
    text = json.dumps(document, separators=(",", ":"))
    return text + " " * (-len(text) % _HEADER_ALIGNMENT)


class LocalTensors:
    """The tensors of this rank's boxes, to be looked up by chunk."""

    def __init__(self, boxes: Boxes) -> None:
        self._tensors = {
            (name, tuple(box.offset)): box.tensor for name, some in boxes.items() for box in some
        }

    def __getitem__(self, chunk: Chunk) -> Tensor:
        return self._tensors[chunk.name, chunk.offset].detach()

    def data(self, file: PlannedFile) -> Iterator[memoryview]:
        """Yields the data of a file's tensors in order, each on the host only while it is used."""
        for chunk in file.chunks:
            flat = self[chunk].cpu().contiguous().reshape(-1).view(torch.uint8)
            yield flat.numpy().data
