"""How torch.distributed.checkpoint writes and reads parts of logical tensors.

Every part is a chunk of its tensor. Chunks that several ranks hold are written once, by the rank
that has the least to write so far; a reader takes from every chunk what overlaps with its part.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
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

from trainer.tensors import Part


class PartSavePlanner(DefaultSavePlanner):
    """Plans the writing of a dictionary of `Part`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """All parts of this rank; the coordinator takes out what others write."""
        self.plan = SavePlan([_write_item(n, part) for n, part in self.state_dict.items()])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Each chunk in the plan of one rank only."""
        return super().create_global_plan(share_out(all_plans))

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The part's own tensor."""
        return self.state_dict[index.fqn].tensor.contiguous()


class PartLoadPlanner(DefaultLoadPlanner):
    """Plans the reading into a dictionary of `Part`: no more than overlaps with them."""

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
        for name, part in self.state_dict.items():
            entry = self.metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, entry, [_chunk(part)])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The part's own tensor."""
        part: Part = self.state_dict[index.fqn]
        return part.tensor


def _chunk(part: Part) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(part.offset), part.tensor.shape)


def _write_item(name: str, part: Part) -> WriteItem:
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
