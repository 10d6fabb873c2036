"""Reads safetensors files in object storage by ranges of bytes.

A rank fetches the headers, then what overlaps with its boxes: no file has to fit on a disk. Of all
that is read, `BATCH_BYTES`, or one box that is larger, is in memory at a time, twice. Ranges that
are close together are read in one request, others concurrently. Takes a second to import.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import torch
from safetensors.torch import _getdtype
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from data.storage import READ_BYTES, StoragePath
from trainer.parallel.placement import Shape

BATCH_BYTES = 256 << 20
_MAX_GAP = 1 << 20  # bytes that are read for nothing, to save a request
_FIRST_BYTES = 256 << 10  # of a file, in which most headers end
_SHARDING = "DCP_SHARDING_INFO"


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: a chunk of the unsharded tensor `name` that begins at `offset`.

    Its bytes begin at `begin` in the file.
    """

    file: str
    name: str
    dtype: torch.dtype
    shape: Shape
    offset: Shape
    begin: int


@dataclass(frozen=True)
class Box:
    """A box of an entry; `start` is relative to the entry."""

    entry: Entry
    start: Shape
    size: Shape

    @classmethod
    def whole(cls, entry: Entry) -> Box:
        """The whole entry."""
        return cls(entry, (0,) * len(entry.shape), entry.shape)

    @property
    def span(self) -> tuple[int, int]:
        """Begin and end in the file of the bytes from its first to its last element."""
        width, entry = self.entry.dtype.itemsize, self.entry
        if 0 in self.size:
            return entry.begin, entry.begin
        strides = _strides(entry.shape)
        first = sum(at * stride for at, stride in zip(self.start, strides, strict=True))
        last = first + sum((n - 1) * stride for n, stride in zip(self.size, strides, strict=True))
        return entry.begin + first * width, entry.begin + (last + 1) * width

    def tensor(self, content: bytearray, at: int) -> Tensor:
        """Returns the box as a view of bytes in which its span begins at `at`."""
        if 0 in self.size:
            return torch.empty(self.size, dtype=self.entry.dtype)
        first, last = self.span
        count = (last - first) // self.entry.dtype.itemsize
        flat = torch.frombuffer(content, dtype=self.entry.dtype, count=count, offset=at)
        return flat.as_strided(self.size, _strides(self.entry.shape))


def _strides(shape: Shape) -> list[int]:
    strides = [1] * len(shape)
    for dim in reversed(range(len(shape) - 1)):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return strides


def read_entries(folder: StoragePath, files: Sequence[str]) -> list[Entry]:
    """Returns what the headers of the files have."""
    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(lambda file: _read_header(folder, file), files))
    return [entry for header in headers for entry in header]


def _read_header(folder: StoragePath, file: str) -> list[Entry]:
    path = folder / file
    (content,) = path.read_ranges([(0, _FIRST_BYTES)])
    (length,) = struct.unpack("<Q", content[:8])
    if len(content) < 8 + length:
        content += path.read_ranges([(len(content), 8 + length)])[0]
    header = json.loads(content[8 : 8 + length])
    sharding = json.loads(header.pop("__metadata__", {}).get(_SHARDING, "{}"))
    return [
        Entry(
            file=file,
            name=name,
            dtype=_getdtype(facts["dtype"]),
            shape=tuple(facts["shape"]),
            offset=tuple(sharding.get(name, {}).get("saved_offsets", [0] * len(facts["shape"]))),
            begin=8 + length + facts["data_offsets"][0],
        )
        for name, facts in header.items()
    ]


def read_boxes(folder: StoragePath, boxes: Iterable[Box]) -> Iterator[tuple[Box, Tensor]]:
    """Yields the boxes in the order of the files; a tensor is valid until the next is taken."""
    in_order = sorted(boxes, key=lambda box: (box.entry.file, box.span))
    for file, some in groupby(in_order, key=lambda box: box.entry.file):
        for batch in _batches(_joined(some)):
            spans = [(span[0].span[0], max(box.span[1] for box in span)) for span in batch]
            contents = _read_spans(folder / file, spans)
            for span, (begin, _), content in zip(batch, spans, contents, strict=True):
                for box in span:
                    yield box, box.tensor(content, box.span[0] - begin)


def _joined(boxes: Iterable[Box]) -> Iterator[list[Box]]:
    """Yields boxes that one request reads."""
    group: list[Box] = []
    for box in boxes:
        begin, end = box.span
        if group and (begin - group[-1].span[1] > _MAX_GAP or end - group[0].span[0] > READ_BYTES):
            yield group
            group = []
        group.append(box)
    if group:
        yield group


def _batches(spans: Iterable[list[Box]]) -> Iterator[list[list[Box]]]:
    """Yields spans that are in memory together."""
    batch: list[list[Box]] = []
    size = 0
    for span in spans:
        length = span[-1].span[1] - span[0].span[0]
        if batch and size + length > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(span)
        size += length
    if batch:
        yield batch


def _read_spans(path: StoragePath, spans: Sequence[tuple[int, int]]) -> list[bytearray]:
    """Returns the bytes of each span; a long one is read in several requests."""
    pieces = [
        (number, at, min(at + READ_BYTES, end))
        for number, (begin, end) in enumerate(spans)
        for at in range(begin, end, READ_BYTES)
    ]
    contents = [bytearray(end - begin) for begin, end in spans]
    blocks = path.read_ranges([(at, end) for _, at, end in pieces])
    for (number, at, end), block in zip(pieces, blocks, strict=True):
        if len(block) != end - at:
            raise OSError(0, f"has ended at byte {at + len(block)}", str(path))
        begin = spans[number][0]
        contents[number][at - begin : end - begin] = block
    return contents


class ObjectReader(HuggingFaceStorageReader):
    """What torch.distributed.checkpoint reads a folder in object storage with."""

    def __init__(self, folder: StoragePath, entries: Iterable[Entry]) -> None:
        super().__init__(path=str(folder))
        self.folder = folder
        self.entries = {MetadataIndex(one.name, one.offset): one for one in entries}

    def read_metadata(self) -> Metadata:
        """Returns shapes and chunks by name."""
        tensors: dict[str, TensorStorageMetadata] = {}
        for entry in self.entries.values():
            offset, shape = torch.Size(entry.offset), torch.Size(entry.shape)
            ends = [a + b for a, b in zip(offset, shape, strict=True)]
            properties = TensorProperties(dtype=entry.dtype)
            tensor = tensors.setdefault(
                entry.name, TensorStorageMetadata(properties, torch.Size(ends), [])
            )
            tensor.size = torch.Size(map(max, zip(tensor.size, ends, strict=True)))
            tensor.chunks.append(ChunkStorageMetadata(offset, shape))
        return Metadata(state_dict_metadata=dict(tensors), storage_data=dict(self.entries))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies what the plan names into the planner's tensors."""
        requests = {}
        for number, request in enumerate(plan.items):
            entry = self.entries[request.storage_index]
            start, size = tuple(request.storage_offsets), tuple(request.lengths)
            requests[number] = Box(entry, start, size)
        by_box: dict[Box, list[int]] = {}
        for number, box in requests.items():
            by_box.setdefault(box, []).append(number)
        for box, tensor in read_boxes(self.folder, by_box):
            for number in by_box[box]:
                target = planner.resolve_tensor(plan.items[number]).detach()
                target.copy_(tensor)
                planner.commit_tensor(plan.items[number], target)
        done: Future[None] = Future()
        done.set_result(None)
        return done
