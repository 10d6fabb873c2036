"""How a model becomes this rank's part of it: one sequence, read from top to bottom."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from model import ModelConfig, SampleLayout, V4Model
from model.block import BlockPart
from model.linear import use_fp8
from model.moe import MoE
from model.pointwise import use_compiled
from model.positions import Positions
from trainer.parallel.context import SequencePositions
from trainer.parallel.expert import ExpertDispatch
from trainer.parallel.grid import Grid
from trainer.parallel.placement import Placement, place_all
from trainer.parallel.recompute import apply_recompute
from trainer.parallel.stage_plan import StagePlan


@dataclass(frozen=True)
class LocalModel:
    """A rank's part of a model, on the meta device, and where its tensors lie in the whole."""

    model: V4Model
    placements: dict[str, Placement]
    stages: StagePlan


def localise(
    config: ModelConfig,
    dtype: torch.dtype,
    grid: Grid,
    stages: StagePlan,
    recompute: Collection[BlockPart] = (),
    offload: Collection[BlockPart] = (),
    fp8: bool = False,
    compiled: bool = False,
) -> LocalModel:
    """The model of this rank: layers, heads, experts and tokens that are its own.

    Nothing is allocated; `to_empty` and `init_weights` come next.
    """
    with torch.device("meta"):
        model = V4Model(config, dtype)
    if fp8:
        use_fp8(model)
    keep_stages(model, stages, grid.pipeline.rank)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    placements = place_all(shapes, grid.degrees, grid.rank)
    if grid.tensor.size > 1:
        from trainer.parallel.tensor import split_model  # imports megatron-core, which takes long

        split_model(model, grid.tensor, dtype)
    shrink(model, placements)
    for module in model.modules():
        if isinstance(module, MoE) and grid.expert.size > 1:
            module.dispatch = ExpertDispatch(grid)
    if grid.sequence.size > 1:

        def positions(config: ModelConfig, layout: SampleLayout) -> Positions:
            return SequencePositions(config, layout, grid)

        model.make_positions = positions
    if compiled:
        use_compiled(model)
    if recompute:
        apply_recompute(model, recompute, offload)
    return LocalModel(model, placements, stages)


def keep_stages(model: V4Model, stages: StagePlan, rank: int) -> None:
    """Drop what belongs to the stages of other pipeline ranks; names stay as they are."""
    numbers = stages.stages_of(rank)
    mine = {row for number in numbers for row in stages.layers_of(number)}
    for row in range(len(model.layers)):
        if row not in mine:
            model.layers[row] = nn.Module()
    last = any(stages.is_last(number) for number in numbers)
    if not last:
        for name in ("norm", "head", "hc_head"):
            delattr(model, name)
        model.mtp = nn.ModuleList()
    if 0 not in numbers and not len(model.mtp):
        del model.embed


def shrink(model: nn.Module, placements: dict[str, Placement]) -> None:
    """Give every parameter that is still whole, but should not be, its part's shape."""
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            size = placements[name].size
            if tuple(parameter.shape) != size:
                part = torch.empty(size, dtype=parameter.dtype, device=parameter.device)
                leaf = name.rpartition(".")[2]
                setattr(module, leaf, nn.Parameter(part))
