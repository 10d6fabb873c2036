"""How torch.distributed.checkpoint (DCP) reads boxes of logical tensors.

Every box is one of DCP's chunks of its tensor; a rank may have several of them. A reader takes from
every chunk what overlaps with its boxes. Takes a second to import.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    HuggingFaceStorageReader,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from trainer.checkpoint.logical_tensors import Boxes, TensorBox


def load_boxes(
    reader: HuggingFaceStorageReader, boxes: Boxes, group: dist.ProcessGroup | None
) -> None:
    """Copies from the files of `reader` into this rank's boxes; every rank of `group` calls it.

    A rank reads only what overlaps with its boxes. Every name must be in the files. Raises OSError
    on all ranks where one of them cannot read.
    """
    try:
        with _quiet():
            dcp.load(boxes, storage_reader=reader, planner=BoxLoadPlanner(), process_group=group)
    except dcp.CheckpointException as error:
        raise _os_error_in(error) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses DCP's warning that there is no process group: one process needs none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _os_error_in(error: dcp.CheckpointException) -> OSError:
    """Returns the OSError inside DCP's exception, which carries one exception for each rank."""
    for failure, _ in error.failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, OSError):
                return cause
            cause = cause.__cause__ or cause.__context__
    raise error


class BoxLoadPlanner(DefaultLoadPlanner):
    """Plans reading into lists of `TensorBox` by name: only what overlaps with them."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Takes the boxes as they are."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """Plans what this rank reads. Every name is in the checkpoint, as was checked before."""
        assert self.metadata is not None
        items = []
        for name, boxes in self.state_dict.items():
            entry = self.metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata)
            chunks = [_chunk(box) for box in boxes]
            items += create_read_items_for_chunk_list(name, entry, chunks)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Returns the tensor of a box."""
        return _box_at(self.state_dict[index.fqn], index).tensor


def _box_at(boxes: list[TensorBox], index: MetadataIndex) -> TensorBox:
    return next(box for box in boxes if index.offset == torch.Size(box.offset))


def _chunk(box: TensorBox) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offset), box.tensor.shape)
