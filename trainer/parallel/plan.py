"""How a model becomes this rank's part of it: one sequence, read from top to bottom.

Before there is memory (`localise`):

1. Execution: what every module is given when it is made, since none is changed afterwards: matmuls
   and pointwise ops, then experts over ranks, rows over ranks, the heads' vocabulary over ranks,
   and last recomputation, which repeats all that the others do inside a block.
2. Stages: layers of other pipeline ranks are dropped first, so that nothing else handles them.
3. Placement: which part of every remaining tensor is this rank's, from the complete shapes, which
   only exist before anything is split.
4. Tensor: the embedding is swapped for one that looks up its part of the vocabulary; heads, groups
   and the shared expert need no other module, only smaller weights.
5. Shapes: every parameter gets its part's shape, with the experts'. Still nothing is allocated.

After `to_empty` and `init_weights`, on the device:

6. Gradients (`fp32_gradients`) belong to parameters that have their memory.
7. Optimizer sharding (`shard_optimizer`): owners of masters and states, by the placements.
8. Schedule (`make_pipeline`): the order of stages and microbatches; it may be made at any time
   after the stages, and only runs what is there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from model import ModelConfig, V4Model
from model.dispatch import Dispatch
from model.execution import LOCAL, BlockPart, Execution
from model.linear import FP8, PLAIN
from model.pointwise import EAGER_OR_TRITON, compiled_or_triton
from optim import Assignment, HybridZero, OptimConfig
from optim.zero.group import Precision
from trainer.parallel.context import place_on_ranks
from trainer.parallel.expert import ExpertDispatch
from trainer.parallel.gradients import Gradients
from trainer.parallel.grid import Grid
from trainer.parallel.optimizer_sharding import make_zero
from trainer.parallel.pipeline import Pipeline
from trainer.parallel.placement import Placement, place_all
from trainer.parallel.recompute import Recompute
from trainer.parallel.stage_plan import StagePlan, tied_embedding


@dataclass(frozen=True)
class LocalModel:
    """A rank's part of a model, and where its tensors lie in the complete ones."""

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
    dispatch: Dispatch | None = None,
) -> LocalModel:
    """This rank's part of the model on the meta device: its layers, heads, experts and tokens.

    `dispatch` replaces the one that experts over ranks need. `to_empty` and `init_weights` come
    next.
    """
    # 1. Execution.
    execution = make_execution(grid, recompute, offload, fp8, compiled, dispatch)
    with torch.device("meta"):
        model = V4Model(config, dtype, execution)
    # 2. Stages.
    keep_stages(model, stages, grid.pipeline.rank)
    # 3. Placement.
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    placements = place_all(shapes, grid.degrees, grid.rank)
    # 4. Tensor.
    if grid.tensor.size > 1 and hasattr(model, "embed"):  # which a pipeline stage may lack
        from trainer.parallel.tensor import SplitEmbedding  # imports megatron-core: seconds

        model.embed = SplitEmbedding(model.embed, grid.tensor)
    # 5. Shapes.
    shrink(model, placements)
    return LocalModel(model, placements, stages)


def make_execution(
    grid: Grid,
    recompute: Collection[BlockPart] = (),
    offload: Collection[BlockPart] = (),
    fp8: bool = False,
    compiled: bool = False,
    dispatch: Dispatch | None = None,
) -> Execution:
    """How the model runs on this rank; see `localise`."""
    if dispatch is None:
        dispatch = ExpertDispatch(grid) if grid.expert.size > 1 else LOCAL.dispatch
    place_tokens = LOCAL.place_tokens
    if grid.sequence.size > 1:
        place_tokens = partial(place_on_ranks, grid=grid)
    cross_entropy = LOCAL.cross_entropy
    if grid.tensor.size > 1:
        from trainer.parallel.tensor import VocabCrossEntropy  # imports megatron-core: seconds

        cross_entropy = VocabCrossEntropy(grid.tensor)
    return Execution(
        matmuls=FP8 if fp8 else PLAIN,
        pointwise=compiled_or_triton() if compiled else EAGER_OR_TRITON,
        dispatch=dispatch,
        place_tokens=place_tokens,
        cross_entropy=cross_entropy,
        compute=Recompute(recompute, offload) if recompute else LOCAL.compute,
    )


def keep_stages(model: V4Model, stages: StagePlan, rank: int) -> None:
    """Drops what belongs to the stages of other pipeline ranks; names stay as they are."""
    numbers = stages.stages_of(rank)
    rows = {row for number in numbers for row in stages.layers_of(number)}
    for row in range(len(model.layers)):
        if row not in rows:
            model.layers[row] = nn.Module()
    last = any(stages.is_last(number) for number in numbers)
    if not last:
        for name in ("norm", "head", "hc_head"):
            delattr(model, name)
        model.mtp = nn.ModuleList()
    if 0 not in numbers and not len(model.mtp):
        del model.embed


def shrink(model: nn.Module, placements: dict[str, Placement]) -> None:
    """Gives every parameter that still has the complete shape, but should not, its part's."""
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            size = placements[name].size
            if tuple(parameter.shape) != size:
                part = torch.empty(size, dtype=parameter.dtype, device=parameter.device)
                leaf = name.rpartition(".")[2]
                setattr(module, leaf, nn.Parameter(part))


def fp32_gradients(local: LocalModel) -> Gradients:
    """6. Gradients of all parameters, in fp32 whatever the weights are in."""
    return Gradients(local.model.parameters())


def shard_optimizer(
    local: LocalModel,
    table: Sequence[Assignment],
    config: OptimConfig,
    grid: Grid,
    seed: int = 0,
    padding: float = 0.1,
    gradients: Precision = "fp32",
    expert_gradients: Precision = "fp32",
) -> HybridZero:
    """7. The optimizer, whose masters and states are divided over ranks; see `make_zero`."""
    return make_zero(
        dict(local.model.named_parameters()),
        local.placements,
        table,
        config,
        grid,
        tied_embedding(local.stages, local.model.config.num_nextn_predict_layers),
        seed,
        padding,
        gradients,
        expert_gradients,
    )


def make_pipeline(local: LocalModel, grid: Grid) -> Pipeline:
    """8. The schedule that runs this rank's stages over the microbatches of a step."""
    return Pipeline(local.model, local.stages, grid.pipeline)
