"""The logical tensors of a run by name, as checkpoints hold them, and the parts of them on a rank.

Each expert's matrix is an entry of its own under its official name
(`layers.0.ffn.experts.3.w1.weight`), and optimizer states carry the name of their parameter
behind `optim.<state>.`. Where the optimizer keeps an fp32 master of a bf16 parameter, the master
stands under the parameter's name, and loading rounds it again to the same bf16 weight. A rank has
as many boxes of a tensor as its share of the optimizer's elements makes up.
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
from trainer.parallel.placement import Placement, Shape, place

MASTER = "master"
STEP = "step"
"""The optimizer's state that is one number for a whole parameter, however that is split."""
_STATES = "optim."
_ROUTING = "routing."


@dataclass(frozen=True)
class TensorBox:
    """What a rank holds of a logical tensor of the whole `shape`: a box that begins at `offset`."""

    tensor: Tensor
    shape: Shape
    offset: Shape

    @classmethod
    def whole(cls, tensor: Tensor) -> TensorBox:
        """A tensor of which nothing is elsewhere."""
        return cls(tensor, tuple(tensor.shape), (0,) * tensor.dim())


Boxes = dict[str, list[TensorBox]]
"""What a rank holds, by name: boxes that do not overlap."""


def logical_tensors(
    model: nn.Module,
    states: Iterable[StateSlice],
    placements: Mapping[str, Placement] | None = None,
) -> Boxes:
    """Live tensors of the model and its optimizer by logical name; loading copies into them.

    `states` are the optimizer's: what this rank keeps of each. `placements` say by the name of a
    parameter or buffer which part of it is here; what is not among them is whole. Experts are
    numbered as in the whole model.
    """
    logical: Boxes = {}
    local = model.state_dict()
    trained = {name for name, _ in model.named_parameters()}
    where = dict(placements or {})
    for name, tensor in local.items():
        if name not in where:
            where[name] = place(name, tuple(tensor.shape), Degrees(1), 0)
    mastered = set()
    for piece in states:
        if piece.kind == MASTER:
            mastered.add(piece.name)
        prefix = "" if piece.kind == MASTER else f"{_STATES}{piece.kind}."
        if piece.kind == STEP:
            logical[f"{prefix}{official_name(piece.name)}"] = [TensorBox.whole(piece.tensor)]
            continue
        for name, part in boxes_of(piece, where[piece.name]):
            logical.setdefault(f"{prefix}{name}", []).append(part)
    for name, tensor in local.items():
        if name in mastered or (name in trained and has_master(tensor)):
            continue  # masters are among the states, of this rank or of others
        assert tuple(tensor.shape) == where[name].size, f"{name} is not what its placement says"
        for entry, part in boxes_of(StateSlice("", name, tensor.detach()), where[name]):
            logical.setdefault(entry, []).append(part)
    return logical


def has_master(tensor: Tensor) -> bool:
    """Whether an optimizer keeps an fp32 master of a parameter."""
    return tensor.dtype != torch.float32


def boxes_of(piece: StateSlice, placement: Placement) -> Iterator[tuple[str, TensorBox]]:
    """A piece's boxes by the name of their entry in a checkpoint: each expert has one of its own.

    `placement` is that of the parameter that the piece belongs to.
    """
    shape, origin = placement.size, placement.offset
    if piece.is_gathered:  # whole matrices; of experts, those that are here
        shape = placement.matrix_shape
        origin = (origin[0] if placement.kind == "expert" else 0,) + (0,) * (len(shape) - 1)
    entry = official_name(piece.name)
    flat, at = piece.tensor.view(-1), 0
    for offset, size in boxes(piece.start, piece.start + flat.numel(), shape):
        tensor = flat[at : (at := at + math.prod(size))].view(size)
        place_ = tuple(a + b for a, b in zip(origin, offset, strict=True))
        if placement.kind != "expert":
            yield entry, TensorBox(tensor, placement.shape, place_)
            continue
        for number, view in enumerate(tensor, start=place_[0]):
            yield expert_name(entry, number), TensorBox(view, placement.shape[1:], place_[1:])


def boxes(start: int, stop: int, shape: Shape) -> Iterator[tuple[Shape, Shape]]:
    """Offsets and sizes of the boxes that elements `start` to `stop` of a flat tensor make up."""
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
    """Whether an entry of a checkpoint is no weight or buffer of the model."""
    return name.startswith((_STATES, _ROUTING))


def routing_name(step: int, layer: int) -> str:
    """The entry of the experts that were chosen ahead of a step, [rows, length, A]."""
    return f"{_ROUTING}{step:08d}.{layer:03d}"


def is_routing(name: str) -> bool:
    """Whether an entry is a choice of experts, which only training has a use for."""
    return name.startswith(_ROUTING)
