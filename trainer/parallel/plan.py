"""Turns a model into this rank's part of it: one sequence, to be read from top to bottom.

On the meta device, before memory is allocated (`build_local_model`):

1. Execution, passed to modules at construction: kernels and matmuls, the dispatch of tokens
   to experts, the exchange of tokens between ranks, the cross-entropy over a sharded vocabulary,
   and activation checkpointing.
2. Stages: layers of other pipeline ranks are dropped first, so that no later step handles them.
3. Placement: this rank's shard of every remaining tensor, from the unsharded shapes, known only
   before anything is sharded.
4. Tensor: the embedding is replaced by one that looks up its shard of the vocabulary; attention
   heads, output groups and the shared expert only need smaller weights.
5. Shapes: every parameter gets the shape of its shard.

After `to_empty` and `init_weights`, on the device:

6. Gradients (`fp32_gradients`), which need allocated parameters.
7. Optimizer sharding (`shard_optimizer`): which rank owns which master weights and optimizer
   states.
8. Schedule (`make_pipeline`): the order of stages and microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from model import ModelConfig, V4Model
from model.dispatch import Dispatch
from model.execution import BlockPart, Execution, local_execution
from model.kernels.operations import ALL_EAGER, Kernels
from optim import Assignment, HybridZero, OptimConfig
from optim.syrk import Syrk, syrk_
from optim.zero.group import Precision
from trainer.parallel.context import shard_rows
from trainer.parallel.expert import ExpertDispatch
from trainer.parallel.gradients import Gradients
from trainer.parallel.grid import Grid
from trainer.parallel.optimizer_sharding import build_hybrid_zero
from trainer.parallel.pipeline import Pipeline
from trainer.parallel.placement import Placement, placements_of
from trainer.parallel.recompute import ActivationCheckpointing
from trainer.parallel.stage_plan import StagePlan, embedding_is_replicated


@dataclass(frozen=True)
class LocalModel:
    """A rank's part of a model, and which shards of the unsharded tensors it holds."""

    model: V4Model
    placements: dict[str, Placement]
    stages: StagePlan


def build_local_model(
    config: ModelConfig,
    dtype: torch.dtype,
    grid: Grid,
    stages: StagePlan,
    recompute: Collection[BlockPart] = (),
    offload: Collection[BlockPart] = (),
    fp8: bool = False,
    kernels: Kernels = ALL_EAGER,
    dispatch: Dispatch | None = None,
) -> LocalModel:
    """Builds this rank's part of the model on the meta device.

    `dispatch` overrides the default dispatch for this grid. Call `to_empty` and `init_weights`
    next.
    """
    # 1. Execution.
    execution = make_execution(grid, recompute, offload, fp8, kernels, dispatch)
    with torch.device("meta"):
        model = V4Model(config, dtype, execution)
    # 2. Stages.
    keep_stages(model, stages, grid.pipeline.rank)
    # 3. Placement.
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    placements = placements_of(shapes, grid.degrees, grid.rank)
    # 4. Tensor.
    # Later pipeline stages have no embedding.
    if grid.tensor.size > 1 and hasattr(model, "embed"):
        from trainer.parallel.tensor import ShardedEmbedding  # imports megatron-core: seconds

        model.embed = ShardedEmbedding(model.embed, grid.tensor)
    # 5. Shapes.
    shard_parameters(model, placements)
    return LocalModel(model, placements, stages)


def make_execution(
    grid: Grid,
    recompute: Collection[BlockPart] = (),
    offload: Collection[BlockPart] = (),
    fp8: bool = False,
    kernels: Kernels = ALL_EAGER,
    dispatch: Dispatch | None = None,
) -> Execution:
    """Returns the Execution of this rank; arguments as in `build_local_model`."""
    execution = local_execution(kernels, fp8)
    if dispatch is not None:
        execution = replace(execution, dispatch=dispatch)
    elif grid.expert_all_to_all.size > 1:
        execution = replace(execution, dispatch=ExpertDispatch(grid, kernels.permute))
    if grid.sequence.size > 1:
        execution = replace(execution, place_tokens=partial(shard_rows, grid=grid))
    if grid.tensor.size > 1:
        from trainer.parallel.tensor import VocabCrossEntropy  # imports megatron-core: seconds

        execution = replace(execution, cross_entropy=VocabCrossEntropy(grid.tensor))
    if recompute:
        execution = replace(execution, call_part=ActivationCheckpointing(recompute, offload))
    return execution


def keep_stages(model: V4Model, stages: StagePlan, rank: int) -> None:
    """Drops the modules of other pipeline ranks; the names of the rest do not change."""
    stage_ids = stages.stages_of(rank)
    local = {index for stage_id in stage_ids for index in stages.layers_of(stage_id)}
    for index in range(len(model.layers)):
        if index not in local:
            model.layers[index] = nn.Module()
    has_last_stage = any(stages.is_last(stage_id) for stage_id in stage_ids)
    if not has_last_stage:
        for name in ("norm", "head", "hc_head"):
            delattr(model, name)
        model.mtp = nn.ModuleList()
    if 0 not in stage_ids and not len(model.mtp):
        del model.embed


def shard_parameters(model: nn.Module, placements: dict[str, Placement]) -> None:
    """Gives every parameter the shape of its shard."""
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            shape = placements[name].local_shape
            if tuple(parameter.shape) != shape:
                shard = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
                leaf = name.rpartition(".")[2]
                setattr(module, leaf, nn.Parameter(shard))


def fp32_gradients(local: LocalModel) -> Gradients:
    """Returns fp32 gradients of all parameters, whatever the dtype of the weights."""
    model = local.model
    return Gradients(model.parameters(), used_once=list(model.layers.parameters()))


def shard_optimizer(
    local: LocalModel,
    table: Sequence[Assignment],
    config: OptimConfig,
    grid: Grid,
    seed: int = 0,
    max_padding: float = 0.1,
    grad_reduce_dtype: Precision = "fp32",
    expert_grad_reduce_dtype: Precision = "fp32",
    kernels: Kernels = ALL_EAGER,
) -> HybridZero:
    """Returns the optimizer with states sharded over ranks; see `build_hybrid_zero`."""
    syrk: Syrk = syrk_
    if kernels.syrk.name == "triton":
        from optim import syrk_triton

        kernel: Callable[..., Tensor] = syrk_triton.syrk_
        syrk = partial(kernel, **kernels.syrk.blocks)
    elif kernels.syrk.name == "quack":
        from optim import syrk_quack

        syrk = syrk_quack.syrk_
    return build_hybrid_zero(
        dict(local.model.named_parameters()),
        local.placements,
        table,
        config,
        grid,
        embedding_is_replicated(local.stages, local.model.config.num_nextn_predict_layers),
        seed,
        max_padding,
        grad_reduce_dtype,
        expert_grad_reduce_dtype,
        syrk=syrk,
    )


def make_pipeline(local: LocalModel, grid: Grid) -> Pipeline:
    """Returns the schedule that runs this rank's stages over the microbatches of a step."""
    return Pipeline(local.model, local.stages, grid.pipeline)
