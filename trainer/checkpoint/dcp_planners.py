"""How torch.distributed.checkpoint writes and reads parts of logical tensors.

Every part is a chunk of its tensor, of which a rank may have several. Chunks that several ranks
hold are written once, by the rank that has the least to write so far; a reader takes from every
chunk what overlaps with its parts.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

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

from trainer.checkpoint.logical_tensors import Boxes, TensorBox

FILE_BYTES = 1 << 30


def save_boxes(folder: Path, boxes: Boxes, group: dist.ProcessGroup | None) -> None:
    """Writes the boxes of all ranks of `group` into safetensors files in `folder`.

    Every rank calls it. Raises OSError on all ranks where one of them cannot write.
    """
    writer = BoxWriter(str(folder), save_distributed=True)
    try:
        with _quiet():
            dcp.save(boxes, storage_writer=writer, planner=BoxSavePlanner(), process_group=group)
    except dcp.CheckpointException as error:
        raise _os_error_in(error) from None


def load_boxes(folder: Path, boxes: Boxes, group: dist.ProcessGroup | None) -> None:
    """Copies from the files in `folder` into this rank's boxes; every rank of `group` calls it.

    A rank reads only what overlaps with its boxes. Every name must be in the files.
    """
    reader = HuggingFaceStorageReader(str(folder))
    with _quiet():
        dcp.load(boxes, storage_reader=reader, planner=BoxLoadPlanner(), process_group=group)


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
        """All parts of this rank; the coordinator takes out what others write."""
        parts = [(name, part) for name, some in self.state_dict.items() for part in some]
        self.plan = SavePlan([_write_item(name, part) for name, part in parts])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Each chunk in the plan of one rank only."""
        return super().create_global_plan(share_out(all_plans))

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The part's own tensor."""
        return _part_at(self.state_dict[index.fqn], index).tensor.contiguous()


class BoxLoadPlanner(DefaultLoadPlanner):
    """Plans the reading into lists of `TensorBox` by name: no more than overlaps with them."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the parts as they are."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """What this rank reads. Every name is in the checkpoint: that was checked before."""
        assert self.metadata is not None
        items = []
        for name, parts in self.state_dict.items():
            entry = self.metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata)
            chunks = [_chunk(part) for part in parts]
            items += create_read_items_for_chunk_list(name, entry, chunks)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The part's own tensor."""
        return _part_at(self.state_dict[index.fqn], index).tensor


class BoxWriter(HuggingFaceStorageWriter):
    """Writes a rank's parts into files of at most FILE_BYTES, or of one part that is larger.

    torch brings a whole file's tensors to the host and copies them twice more before it writes.
    """

    def _split_by_storage_plan(
        self, storage_plan: dict[str, int] | None, items: list[WriteItem]
    ) -> dict[int, list[WriteItem]]:
        """Each part into the first file that has room and no other part of its tensor."""
        files: list[list[WriteItem]] = []
        names: list[set[str]] = []
        sizes: list[int] = []
        for item in items:
            name, size = item.index.fqn, _bytes(item)
            fits = (
                number
                for number, held in enumerate(sizes)
                if held + size <= FILE_BYTES and name not in names[number]
            )
            place = next(fits, len(files))
            if place == len(files):
                files.append([])
                names.append(set())
                sizes.append(0)
            files[place].append(item)
            names[place].add(name)
            sizes[place] += size
        return dict(enumerate(files, start=1))


def _part_at(parts: list[TensorBox], index: MetadataIndex) -> TensorBox:
    return next(part for part in parts if index.offset == torch.Size(part.offset))


def _chunk(part: TensorBox) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(part.offset), part.tensor.shape)


def _write_item(name: str, part: TensorBox) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(name, part.offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=_chunk(part),
            properties=TensorProperties.create_from_tensor(part.tensor),
            size=torch.Size(part.shape),
        ),
    )


def share_out(plans: list[SavePlan]) -> list[SavePlan]:
    """The plans without what another rank writes, so that ranks write about equally much.

    Chunks with the fewest holders come first, then the largest; each goes to the holder that has
    the least so far. torch's own division takes them as they come and counts whole tensors: the
    last rank of a split tensor would write everything else, too.
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
