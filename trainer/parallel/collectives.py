"""The collectives of data-parallel training, each a no-op when the group is None."""

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

Item = TypeVar("Item")

BUCKET_ELEMENTS = 32 * 1024 * 1024  # 128 MiB of fp32: long enough to use the links fully


def sum_(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum `tensor` over the group, in place; returns it."""
    if group is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def gather_objects(item: Item, group: dist.ProcessGroup | None) -> list[Item]:
    """Every rank's `item`, by rank. For small things outside the step: it pickles over the wire."""
    if group is None:
        return [item]
    items: list[Item] = [item] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items


def barrier(group: dist.ProcessGroup | None) -> None:
    """Wait until every rank of the group is here."""
    if group is not None:
        dist.barrier(group=group)


class FlatGradients:
    """fp32 gradients of all parameters, in a few flat buckets of which every `.grad` is a view.

    Backward adds into the buckets in place, so that summing over ranks copies nothing, bf16
    parameters gather their microbatches in fp32, and a parameter that got no gradient on one rank
    has zeros there rather than None.
    """

    def __init__(
        self, parameters: Iterable[Parameter], bucket_elements: int = BUCKET_ELEMENTS
    ) -> None:
        self.buckets: list[Tensor] = []
        waiting: list[Parameter] = []
        size = 0
        for parameter in parameters:
            if waiting and size + parameter.numel() > bucket_elements:
                self._fill_bucket(waiting, size)
                waiting, size = [], 0
            waiting.append(parameter)
            size += parameter.numel()
        if waiting:
            self._fill_bucket(waiting, size)

    def _fill_bucket(self, parameters: list[Parameter], size: int) -> None:
        flat = torch.zeros(size, dtype=torch.float32, device=parameters[0].device)
        start = 0
        for parameter in parameters:
            stop = start + parameter.numel()
            parameter.grad_dtype = torch.float32
            parameter.grad = flat[start:stop].view(parameter.shape)
            start = stop
        self.buckets.append(flat)

    def zero_(self) -> None:
        """Set every gradient to zero; the `.grad` views stay."""
        for bucket in self.buckets:
            bucket.zero_()

    def sum_(self, group: dist.ProcessGroup | None) -> None:
        """Sum all gradients over the group, bucket by bucket."""
        if group is None:
            return
        works = [dist.all_reduce(bucket, group=group, async_op=True) for bucket in self.buckets]
        for work in works:
            work.wait()
