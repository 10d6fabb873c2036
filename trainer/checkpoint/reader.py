"""Reads the tensors of a checkpoint without a model or a process group.

Imports torch.distributed.checkpoint, which takes a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import MetadataIndex

from trainer.parallel.placement import Shape


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

    def __init__(self, path: Path) -> None:
        self.shapes: dict[str, Shape] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        metadata = HuggingFaceStorageReader(str(path)).read_metadata()
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            self.shapes[name] = tuple(entry.size)
            self._chunks[name] = [
                _Chunk(
                    metadata.storage_data[MetadataIndex(name, chunk.offsets)].relative_path,
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
        files: dict[str, list[tuple[str, _Chunk]]] = {}
        for name in tensors:
            for chunk in self._chunks[name]:
                files.setdefault(chunk.file, []).append((name, chunk))
        for path, chunks in files.items():
            with safe_open(path, framework="pt") as file:
                for name, chunk in chunks:
                    chunk.of(tensors[name]).copy_(file.get_tensor(name))
        return tensors
