"""Reads the tensors of a checkpoint without a model or a process group.

Imports torch.distributed.checkpoint, which takes a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import MetadataIndex

from data.storage import AnyPath, StoragePath
from trainer.checkpoint import manifest
from trainer.checkpoint.object_reader import Box, Entry, ObjectReader, read_boxes, read_entries
from trainer.parallel.placement import Shape
from trainer.process.errors import CheckpointError


def weight_files(path: StoragePath) -> list[str]:
    """Returns the names of a checkpoint's safetensors files, by its manifest.

    Raises CheckpointError where it is damaged.
    """
    files, broken = manifest.read(path)
    if broken:
        raise CheckpointError(f"{path} is damaged: {broken}")
    return sorted(name for name in files if name.endswith(".safetensors"))


def open_reader(path: AnyPath, entries: list[Entry] | None = None) -> HuggingFaceStorageReader:
    """Returns torch's reader of a checkpoint; `entries` saves reading the headers again."""
    if isinstance(path, StoragePath):
        return ObjectReader(path, entries or read_entries(path, weight_files(path)))
    return HuggingFaceStorageReader(str(path))


@dataclass(frozen=True)
class _Chunk:
    """A box of a tensor, and the file that it is in."""

    file: str
    offset: Shape
    size: Shape

    def of(self, tensor: Tensor) -> Tensor:
        """Returns this box of the unsharded tensor, as a view."""
        for dim, (start, length) in enumerate(zip(self.offset, self.size, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor


class CheckpointReader:
    """The tensors of a complete checkpoint folder; at first only the files' headers are read.

    Attributes:
        shapes: unsharded shapes by name.
    """

    def __init__(self, path: AnyPath, reader: HuggingFaceStorageReader | None = None) -> None:
        self.shapes: dict[str, Shape] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        self._reader = reader or open_reader(path)
        metadata = self._reader.read_metadata()
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            self.shapes[name] = tuple(entry.size)
            self._chunks[name] = [
                _Chunk(
                    _file_of(metadata.storage_data[MetadataIndex(name, chunk.offsets)]),
                    tuple(chunk.offsets),
                    tuple(chunk.sizes),
                )
                for chunk in entry.chunks
            ]

    def read(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """Returns unsharded tensors on the host, in the order of `dtypes` and rounded to them.

        Needs memory for these and one chunk. Raises KeyError for a name that is not there.
        """
        tensors = {n: torch.empty(self.shapes[n], dtype=dtype) for n, dtype in dtypes.items()}
        if isinstance(self._reader, ObjectReader):
            boxes = [Box.whole(one) for one in self._reader.entries.values() if one.name in tensors]
            for box, tensor in read_boxes(self._reader.folder, boxes):
                entry = box.entry
                chunk = _Chunk(entry.file, entry.offset, entry.shape)
                chunk.of(tensors[entry.name]).copy_(tensor)
            return tensors
        files: dict[str, list[tuple[str, _Chunk]]] = {}
        for name in tensors:
            for chunk in self._chunks[name]:
                files.setdefault(chunk.file, []).append((name, chunk))
        for path, chunks in files.items():
            with safe_open(path, framework="pt") as file:
                for name, chunk in chunks:
                    chunk.of(tensors[name]).copy_(file.get_tensor(name))
        return tensors


def _file_of(stored: Any) -> str:
    """Returns the file of a chunk, as either reader has it."""
    return stored.file if isinstance(stored, Entry) else stored.relative_path
