"""The tensors of a checkpoint on the disk, read without a model and without a process group."""

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
    """A box of a tensor, and the file that it stands in."""

    file: str
    offset: Shape
    size: Shape

    def of(self, whole: Tensor) -> Tensor:
        """This box of the whole tensor, as a view."""
        for dim, (start, length) in enumerate(zip(self.offset, self.size, strict=True)):
            whole = whole.narrow(dim, start, length)
        return whole


class CheckpointReader:
    """What a whole checkpoint folder holds. Only the files' headers are read at first.

    Attributes:
        shapes: whole shapes by name.
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
        """Whole tensors on the host, rounded to the dtypes given, in the order given.

        Holds no more than these and one chunk. Raises KeyError for a name that is not there.
        """
        whole = {n: torch.empty(self.shapes[n], dtype=dtype) for n, dtype in dtypes.items()}
        files: dict[str, list[tuple[str, _Chunk]]] = {}
        for name in whole:
            for chunk in self._chunks[name]:
                files.setdefault(chunk.file, []).append((name, chunk))
        for path, chunks in files.items():
            with safe_open(path, framework="pt") as file:
                for name, chunk in chunks:
                    chunk.of(whole[name]).copy_(file.get_tensor(name))
        return whole
