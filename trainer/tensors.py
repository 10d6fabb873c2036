"""The logical tensors of a run by name, as checkpoints hold them, and the parts of them on a rank.

Each expert's matrix is an entry of its own under its official name
(`layers.0.ffn.experts.3.w1.weight`), and optimizer states carry the name of their parameter
behind `optim.<state>.`. Where the optimizer keeps an fp32 master of a bf16 parameter, the master
stands under the parameter's name, and loading rounds it again to the same bf16 weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from trainer.parallel.grid import Sizes
from trainer.parallel.placement import Placement, Shape, place

MASTER = "master."
STEP = "step"
"""The optimizer's state that is one number for a whole parameter, however that is split."""
_STATES = "optim."
_ROUTING = "routing."


@dataclass(frozen=True)
class Part:
    """What a rank holds of a logical tensor of the whole `shape`: a box that begins at `offset`."""

    tensor: Tensor
    shape: Shape
    offset: Shape

    @classmethod
    def whole(cls, tensor: Tensor) -> Part:
        """A tensor of which nothing is elsewhere."""
        return cls(tensor, tuple(tensor.shape), (0,) * tensor.dim())


def logical_tensors(
    model: nn.Module,
    states: Mapping[str, Tensor],
    placements: Mapping[str, Placement] | None = None,
) -> dict[str, Part]:
    """Live tensors of the model and its optimizer by logical name; loading copies into them.

    `states` are the optimizer's `state_tensors()`: `<state>.<parameter>`, each state in the shape
    of its parameter, or for the whole parameter. `placements` say by the name of a parameter or
    buffer which part of it is here; what is not among them is whole. Experts are numbered as in
    the whole model.
    """
    logical: dict[str, Part] = {}
    placements = placements or {}
    local = model.state_dict()
    for name, tensor in local.items():
        held = states.get(MASTER + name, tensor.detach())
        logical.update(_entries(name, held, placements))
    for key, tensor in states.items():
        if key.startswith(MASTER):
            continue
        state, _, name = key.partition(".")
        if state == STEP:
            logical[f"{_STATES}{key}"] = Part.whole(tensor)
            continue
        for entry, part in _entries(name, tensor, placements):
            logical[f"{_STATES}{state}.{entry}"] = part
    return logical


def is_state(name: str) -> bool:
    """Whether an entry of a checkpoint is no weight or buffer of the model."""
    return name.startswith((_STATES, _ROUTING))


def routing_name(step: int, layer: int) -> str:
    """The entry of the experts that were chosen ahead of a step, [rows, length, A]."""
    return f"{_ROUTING}{step:08d}.{layer:03d}"


def is_routing(name: str) -> bool:
    """Whether an entry is a choice of experts, which only training has a use for."""
    return name.startswith(_ROUTING)


def _entries(
    name: str, tensor: Tensor, placements: Mapping[str, Placement]
) -> Iterator[tuple[str, Part]]:
    """A tensor's entries in a checkpoint: itself, or each matrix of a stack of experts."""
    placement = placements.get(name) or place(name, tuple(tensor.shape), Sizes(1), 0)
    assert tuple(tensor.shape) == placement.size, f"{name} has another shape than its placement"
    if placement.kind != "expert":
        yield name, Part(tensor, placement.shape, placement.offset)
        return
    experts, _, matrix = name.rpartition(".")
    for number, view in enumerate(tensor, start=placement.offset[0]):
        entry = f"{experts}.{number}.{matrix}.weight"
        yield entry, Part(view, placement.shape[1:], placement.offset[1:])
