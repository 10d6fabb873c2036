"""How torch.distributed.checkpoint (DCP) writes and reads boxes of logical tensors.

Every box is one of DCP's chunks of its tensor; a rank may have several of them. Chunks that several
ranks hold are written once, by the rank that has the least to write so far; a reader takes from
every chunk what overlaps with its boxes. Takes a second to import.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import safetensors.torch  # noqa: F401 - before the first save, which should not fail of an import
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from data.storage import AnyPath, StoragePath
from trainer.checkpoint.logical_tensors import Boxes, TensorBox
from trainer.checkpoint.manifest import FileRecord
from trainer.checkpoint.uploads import Uploads

FILE_BYTES = 1 << 30


def save_boxes(
    folder: AnyPath, boxes: Boxes, group: dist.ProcessGroup | None
) -> dict[str, FileRecord]:
    """Writes the boxes of all ranks of `group` into safetensors files in `folder`.

    Every rank calls it. Returns the records of the files that this rank sent to object storage; {}
    on a file system. Raises OSError on all ranks where one of them cannot write.
    """
    writer = BoxWriter(str(folder), save_distributed=True)
    uploads = None
    if isinstance(folder, StoragePath):
        uploads = Uploads(folder)
        writer.fs, writer.sync_files = uploads, False
    try:
        with _quiet():
            dcp.save(boxes, storage_writer=writer, planner=BoxSavePlanner(), process_group=group)
    except dcp.CheckpointException as error:
        raise _os_error_in(error) from None
    return {} if uploads is None else uploads.records


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


class BoxSavePlanner(DefaultSavePlanner):
    """Plans the writing of a dictionary of lists of `TensorBox`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """Plans all boxes of this rank; the coordinator removes those that others write."""
        boxes = [(name, box) for name, some in self.state_dict.items() for box in some]
        self.plan = SavePlan([_write_item(name, box) for name, box in boxes])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Leaves each chunk in the plan of one rank."""
        return super().create_global_plan(divide_writes(all_plans))

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Returns the tensor of a box."""
        return _box_at(self.state_dict[index.fqn], index).tensor.contiguous()


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


class BoxWriter(HuggingFaceStorageWriter):
    """Writes a rank's boxes into files of at most FILE_BYTES, or of one box that is larger.

    torch copies all tensors of a file to the host and makes two more copies of them before it
    writes.
    """

    def _split_by_storage_plan(
        self, storage_plan: dict[str, int] | None, items: list[WriteItem]
    ) -> dict[int, list[WriteItem]]:
        """Puts each box into the first file that has room and no other box of its tensor."""
        files: list[list[WriteItem]] = []
        names: list[set[str]] = []
        sizes: list[int] = []
        for item in items:
            name, size = item.index.fqn, _bytes(item)
            fits = (
                number
                for number, filled in enumerate(sizes)
                if filled + size <= FILE_BYTES and name not in names[number]
            )
            file = next(fits, len(files))
            if file == len(files):
                files.append([])
                names.append(set())
                sizes.append(0)
            files[file].append(item)
            names[file].add(name)
            sizes[file] += size
        return dict(enumerate(files, start=1))


def _box_at(boxes: list[TensorBox], index: MetadataIndex) -> TensorBox:
    return next(box for box in boxes if index.offset == torch.Size(box.offset))


def _chunk(box: TensorBox) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offset), box.tensor.shape)


def _write_item(name: str, box: TensorBox) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(name, box.offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=_chunk(box),
            properties=TensorProperties.create_from_tensor(box.tensor),
            size=torch.Size(box.shape),
        ),
    )


def divide_writes(plans: list[SavePlan]) -> list[SavePlan]:
    """Removes from each plan what another rank writes, so that ranks write similar amounts.

    Chunks that the fewest ranks hold come first, then the largest; each goes to the rank that has
    the least so far. torch's division takes chunks in order and counts each at the size of its
    whole tensor: the last rank of a sharded tensor would write everything else as well.
    """
    holders: dict[MetadataIndex, list[int]] = {}
    sizes: dict[MetadataIndex, int] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            holders.setdefault(item.index, []).append(rank)
            sizes[item.index] = _bytes(item)
    load = [0] * len(plans)
    writer: dict[MetadataIndex, int] = {}
    for index in sorted(holders, key=lambda index: (len(holders[index]), -sizes[index])):
        writer[index] = min(holders[index], key=load.__getitem__)
        load[writer[index]] += sizes[index]
    return [
        replace(plan, items=[item for item in plan.items if writer[item.index] == rank])
        for rank, plan in enumerate(plans)
    ]


def _bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
