"""The logical tensors of a run by name, as checkpoints hold them, and a rank's boxes of them.

A logical tensor is one of the unsharded model. A box is a contiguous block of it, given by offset
and shape; DCP calls it a chunk.

Each expert's matrix is a separate entry under its official name
(`layers.0.ffn.experts.3.w1.weight`); optimizer states have the name `optim.<state>.<parameter>`.
Where the optimizer keeps an fp32 master of a bf16 parameter, the master is saved under the
parameter's name, and loading rounds it to the same bf16 weight. A slice of a flattened parameter
that a rank owns may make up several boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.parameters import expert_name, official_name
from optim import StateSlice
from trainer.parallel.grid import Degrees
from trainer.parallel.placement import Placement, Shape, placement_of

MASTER = "master"
WEIGHT = ""
STEP = "step"
"""The optimizer's state that is one number for a parameter, however it is sharded."""
_STATES = "optim."
_ROUTING = "routing."


@dataclass(frozen=True)
class TensorBox:
    """A rank's box of a logical tensor of the unsharded `shape`; it begins at `offset`."""

    tensor: Tensor
    shape: Shape
    offset: Shape

    @classmethod
    def unsharded(cls, tensor: Tensor) -> TensorBox:
        """Returns the box of a tensor that is not sharded."""
        return cls(tensor, tuple(tensor.shape), (0,) * tensor.dim())


Boxes = dict[str, list[TensorBox]]
"""A rank's boxes by the name of their tensor; they do not overlap."""


def logical_tensors(
    model: nn.Module,
    states: Iterable[StateSlice],
    placements: Mapping[str, Placement] | None = None,
) -> Boxes:
    """Returns the live tensors of the model and its optimizer; loading copies into them.

    Args:
        model: this rank's part of the model.
        states: the states of the optimizer on this rank.
        placements: which part of a parameter or buffer this rank holds, by name; those without one
            are not sharded. Experts are numbered as in the whole model.
    """
    logical: Boxes = {}
    placements = dict(placements or {})
    for name, tensor in model.state_dict().items():
        if name not in placements:
            placements[name] = placement_of(name, tuple(tensor.shape), Degrees(1), 0)
    for state in live_slices(model, states):
        prefix = "" if state.kind in (MASTER, WEIGHT) else f"{_STATES}{state.kind}."
        if state.kind == STEP:
            logical[f"{prefix}{official_name(state.name)}"] = [TensorBox.unsharded(state.tensor)]
            continue
        placement = placements[state.name]
        is_whole = tuple(state.tensor.shape) == placement.local_shape
        assert is_whole or state.kind != WEIGHT, f"{state.name} does not match its placement"
        for name, box in boxes_of(state, placement):
            logical.setdefault(f"{prefix}{name}", []).append(box)
    return logical


def live_slices(model: nn.Module, states: Iterable[StateSlice]) -> Iterator[StateSlice]:
    """Yields every tensor that a resume needs, once: `states`, then weights without a master.

    The latter, with the buffers, are of the kind `WEIGHT`.
    """
    with_master = set()
    for state in states:
        if state.kind == MASTER:
            with_master.add(state.name)
        yield state
    trained = {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        if name in with_master or (name in trained and has_master(tensor)):
            continue  # masters are among the states, of this rank or of others
        yield StateSlice(WEIGHT, name, tensor.detach())


def has_master(tensor: Tensor) -> bool:
    """Whether an optimizer keeps an fp32 master of a parameter."""
    return tensor.dtype != torch.float32


def boxes_of(state: StateSlice, placement: Placement) -> Iterator[tuple[str, TensorBox]]:
    """Yields the boxes of a state by the name of their entry; each expert has a separate entry.

    `placement` is that of the state's parameter.
    """
    shape, origin = placement.local_shape, placement.global_offset
    if state.is_gathered:  # unsharded matrices, of this rank's experts
        shape = placement.table_shape
        origin = (origin[0] if placement.kind == "expert" else 0,) + (0,) * (len(shape) - 1)
    entry = official_name(state.name)
    flat, at = state.tensor.view(-1), 0
    for offset, size in boxes(state.start, state.start + flat.numel(), shape):
        tensor = flat[at : (at := at + math.prod(size))].view(size)
        start = tuple(a + b for a, b in zip(origin, offset, strict=True))
        if placement.kind != "expert":
            yield entry, TensorBox(tensor, placement.global_shape, start)
            continue
        for number, view in enumerate(tensor, start=start[0]):
            yield expert_name(entry, number), TensorBox(view, placement.global_shape[1:], start[1:])


def boxes(start: int, stop: int, shape: Shape) -> Iterator[tuple[Shape, Shape]]:
    """Yields offsets and sizes of the boxes that elements `start` to `stop` of a tensor make up."""
    if len(shape) < 2:
        yield (start,)[: len(shape)], (stop - start,)[: len(shape)]
        return
    inner = math.prod(shape[1:])
    while start < stop:
        row, within = divmod(start, inner)
        if within == 0 and stop - start >= inner:
            rows = (stop - start) // inner
            yield (row,) + (0,) * (len(shape) - 1), (rows, *shape[1:])
            start += rows * inner
            continue
        end = min(stop, (row + 1) * inner)
        for offset, size in boxes(within, within + end - start, shape[1:]):
            yield (row, *offset), (1, *size)
        start = end


def is_state(name: str) -> bool:
    """Whether an entry of a checkpoint is neither a weight nor a buffer of the model."""
    return name.startswith((_STATES, _ROUTING))


def routing_name(step: int, layer: int) -> str:
    """The name of experts selected ahead of a step, [rows of the global batch, S, A]."""
    return f"{_ROUTING}{step:08d}.{layer:03d}"


def is_routing(name: str) -> bool:
    """Whether an entry holds selected experts, which only training reads."""
    return name.startswith(_ROUTING)
