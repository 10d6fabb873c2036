"""The collectives of training over the axes of a grid; no-ops on an axis of one rank.

The collectives on activations (`…_tokens`) are differentiable; the backward of each is its adjoint
collective. Each rank's backward produces its part of the gradient, and a weight's gradient is the
sum over the ranks that hold it. Tensor ranks return the same head losses, and each computes
partial gradients of them. Traffic is counted as ring algorithms send it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.parallel.grid import Axis
from trainer.parallel.ring import all_gather_bytes, all_reduce_bytes, reduce_scatter_bytes
from trainer.parallel.waits import Collective

Item = TypeVar("Item")
Pending = Callable[[], Tensor]
"""A collective that was started: call it once, on every rank, to wait for its result."""

# torch 2.13 has new names for these two and warns of the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce_(tensor: Tensor, axis: Axis) -> Tensor:
    """Sums `tensor` over the axis, in place, and returns it."""
    if axis.group is not None:
        _count(axis, "all_reduce", all_reduce_bytes(axis.size, tensor.nbytes))
        with axis.waiting("all_reduce"):
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=axis.group)
    return tensor


def all_reduce_max_(tensor: Tensor, axis: Axis) -> Tensor:
    """Takes the largest of each element over the axis, in place, and returns it."""
    if axis.group is not None:
        _count(axis, "all_reduce", all_reduce_bytes(axis.size, tensor.nbytes))
        with axis.waiting("all_reduce"):
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=axis.group)
    return tensor


def begin_all_gather(tensor: Tensor, axis: Axis) -> Pending:
    """Starts an all-gather of equally shaped tensors along dim 0; see Pending."""
    if axis.group is None:
        return lambda: tensor
    tensor = tensor.contiguous()
    _count(axis, "all_gather", all_gather_bytes(axis.size, tensor.nbytes))
    out = tensor.new_empty(axis.size * tensor.shape[0], *tensor.shape[1:])
    call = axis.call("all_gather")
    work = _all_gather(out, tensor, group=axis.group, async_op=True)
    return _wait(work, out, tensor, axis, call)


def begin_reduce_scatter(tensor: Tensor, axis: Axis) -> Pending:
    """Starts a reduce-scatter (sum) along dim 0; see Pending."""
    if axis.group is None:
        return lambda: tensor
    tensor = tensor.contiguous()
    _count(axis, "reduce_scatter", reduce_scatter_bytes(axis.size, tensor.nbytes))
    out = tensor.new_empty(tensor.shape[0] // axis.size, *tensor.shape[1:])
    call = axis.call("reduce_scatter")
    work = _reduce_scatter(out, tensor, group=axis.group, async_op=True)
    return _wait(work, out, tensor, axis, call)


def begin_all_to_all(
    tensor: Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis
) -> Pending:
    """Starts an all-to-all: the first send[0] rows go to rank 0, …; receive[r] rows from rank r."""
    if axis.group is None:
        return lambda: tensor
    tensor = tensor.contiguous()
    row = tensor.element_size() * tensor[:1].numel() if len(tensor) else 0
    _count(axis, "all_to_all", (sum(send) - send[axis.rank]) * row)
    out = tensor.new_empty(sum(receive), *tensor.shape[1:])
    sizes = list(receive), list(send)
    call = axis.call("all_to_all")
    work = dist.all_to_all_single(out, tensor, *sizes, group=axis.group, async_op=True)
    return _wait(work, out, tensor, axis, call)


def _wait(work: Any, out: Tensor, sent: Tensor, axis: Axis, call: Collective) -> Pending:
    """Returns the function that waits; it keeps the sent tensor alive until the collective ends."""

    def wait() -> Tensor:
        nonlocal sent
        with axis.waiting(call):
            work.wait()
        sent = out
        return out

    return wait


def all_gather(tensor: Tensor, axis: Axis) -> Tensor:
    """All-gathers equally shaped tensors along dim 0."""
    return begin_all_gather(tensor, axis)()


def reduce_scatter(tensor: Tensor, axis: Axis) -> Tensor:
    """Sums over the axis and returns this rank's slice along dim 0."""
    return begin_reduce_scatter(tensor, axis)()


def all_to_all(tensor: Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis) -> Tensor:
    """Sends send[r] rows to rank r, in order, and returns the rows received, in rank order."""
    return begin_all_to_all(tensor, send, receive, axis)()


def all_gather_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Differentiable `all_gather`; backward is `reduce_scatter`."""
    return x if axis.group is None else _AllGather.apply(x, axis)


def reduce_scatter_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Differentiable `reduce_scatter`; backward is `all_gather`."""
    return x if axis.group is None else _ReduceScatter.apply(x, axis)


def all_to_all_tokens(x: Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis) -> Tensor:
    """Differentiable `all_to_all`; backward sends the rows back."""
    return x if axis.group is None else _AllToAll.apply(x, send, receive, axis)


def slice_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Slices this rank's part of a replicated tensor along dim 0; backward all-gathers."""
    return x if axis.group is None else _Slice.apply(x, axis)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad, ctx.axis), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.axis), None


class _AllToAll(torch.autograd.Function):
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


def all_gather_objects(item: Item, axis: Axis) -> list[Item]:
    """All-gathers `item` from every rank. Uses pickle: only for small objects, outside a step."""
    if axis.group is None:
        return [item]
    items: list[Item] = [item] * axis.size
    with axis.waiting("all_gather_object"):
        dist.all_gather_object(items, item, group=axis.group)
    return items


def broadcast_object(item: Any, axis: Axis) -> Any:
    """Returns the first rank's `item`. Uses pickle: only outside a step."""
    if axis.group is None:
        return item
    items = [item]
    with axis.waiting("broadcast_object"):
        dist.broadcast_object_list(items, src=axis.ranks[0], group=axis.group)
    return items[0]


def barrier(axis: Axis) -> None:
    """Waits until every rank of the axis has called it."""
    if axis.group is not None:
        with axis.waiting("barrier"):
            dist.barrier(group=axis.group)


def _count(axis: Axis, collective: str, size: float) -> None:
    axis.traffic.add(axis.name, collective, size)
