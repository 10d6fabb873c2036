"""The collectives of training over the axes of a grid; no-ops on an axis of one rank.

Those of activations are differentiable, and the backward of each is the transposed collective: a
job's loss is the sum of its ranks' losses, every rank differentiates its own, and a weight's
gradient is the sum over the ranks that hold it. Traffic is counted as ring algorithms send it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.parallel.grid import Axis
from trainer.parallel.ring import gather_bytes, scatter_bytes, sum_bytes

Item = TypeVar("Item")
Wait = Callable[[], Tensor]
"""Waits for a collective that was started and returns its result; call it once, on every rank."""

# torch 2.13 has new names for these two and warns of the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def sum_(tensor: Tensor, axis: Axis) -> Tensor:
    """Sums `tensor` over the axis, in place, and returns it."""
    if axis.group is not None:
        _count(axis, "sum", sum_bytes(axis.size, tensor.nbytes))
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=axis.group)
    return tensor


def begin_all_gather(tensor: Tensor, axis: Axis) -> Wait:
    """Starts an all-gather of equal shapes, concatenated along dim 0; see Wait."""
    if axis.group is None:
        return lambda: tensor
    tensor = tensor.contiguous()
    _count(axis, "gather", gather_bytes(axis.size, tensor.nbytes))
    out = tensor.new_empty(axis.size * tensor.shape[0], *tensor.shape[1:])
    return _wait(_all_gather(out, tensor, group=axis.group, async_op=True), out, tensor)


def begin_reduce_scatter(tensor: Tensor, axis: Axis) -> Wait:
    """Starts a reduce-scatter (sum) along dim 0; see Wait."""
    if axis.group is None:
        return lambda: tensor
    tensor = tensor.contiguous()
    _count(axis, "scatter", scatter_bytes(axis.size, tensor.nbytes))
    out = tensor.new_empty(tensor.shape[0] // axis.size, *tensor.shape[1:])
    return _wait(_reduce_scatter(out, tensor, group=axis.group, async_op=True), out, tensor)


def begin_all_to_all(
    tensor: Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis
) -> Wait:
    """Starts an all-to-all: the first send[0] rows go to rank 0, …; receive[r] rows from rank r."""
    if axis.group is None:
        return lambda: tensor
    tensor = tensor.contiguous()
    row = tensor.element_size() * tensor[:1].numel() if len(tensor) else 0
    _count(axis, "exchange", (sum(send) - send[axis.rank]) * row)
    out = tensor.new_empty(sum(receive), *tensor.shape[1:])
    sizes = list(receive), list(send)
    work = dist.all_to_all_single(out, tensor, *sizes, group=axis.group, async_op=True)
    return _wait(work, out, tensor)


def _wait(work: Any, out: Tensor, sent: Tensor) -> Wait:
    """Returns the function that waits; it keeps the sent tensor alive until then."""

    def wait() -> Tensor:
        nonlocal sent
        work.wait()
        sent = out
        return out

    return wait


def all_gather(tensor: Tensor, axis: Axis) -> Tensor:
    """All-gathers equal shapes along dim 0."""
    return begin_all_gather(tensor, axis)()


def reduce_scatter(tensor: Tensor, axis: Axis) -> Tensor:
    """Sums over the axis and returns this rank's part along dim 0."""
    return begin_reduce_scatter(tensor, axis)()


def all_to_all(tensor: Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis) -> Tensor:
    """Sends send[r] rows to rank r, in order, and returns the rows received, by rank."""
    return begin_all_to_all(tensor, send, receive, axis)()


def gather_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Differentiable `all_gather`; backward is `reduce_scatter`."""
    return x if axis.group is None else _Gather.apply(x, axis)


def scatter_sum(x: Tensor, axis: Axis) -> Tensor:
    """Differentiable `reduce_scatter`; backward is `all_gather`."""
    return x if axis.group is None else _ScatterSum.apply(x, axis)


def exchange(x: Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis) -> Tensor:
    """Differentiable `all_to_all`; backward sends the rows back."""
    return x if axis.group is None else _Exchange.apply(x, send, receive, axis)


def slice_tokens(x: Tensor, axis: Axis) -> Tensor:
    """This rank's part along dim 0 of what all ranks hold; backward gathers the parts."""
    return x if axis.group is None else _Slice.apply(x, axis)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad, ctx.axis), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.axis), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.axis = send, receive, axis
        return all_to_all(x, send, receive, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all(grad, ctx.receive, ctx.send, ctx.axis), None, None, None


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.tensor_split(axis.size)[axis.rank]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.axis), None


def gather_objects(item: Item, axis: Axis) -> list[Item]:
    """Gathers every rank's `item`, by rank. It pickles: only for small objects outside a step."""
    if axis.group is None:
        return [item]
    items: list[Item] = [item] * axis.size
    dist.all_gather_object(items, item, group=axis.group)
    return items


def barrier(axis: Axis) -> None:
    """Waits until every rank of the axis has called it."""
    if axis.group is not None:
        dist.barrier(group=axis.group)


def _count(axis: Axis, collective: str, size: float) -> None:
    axis.traffic.add(axis.name, collective, size)
