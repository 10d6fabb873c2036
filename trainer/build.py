"""Builds what a run trains: this rank's part of the model, its optimizer, and the engine."""

from collections.abc import Sequence

import torch

from model.dispatch import Dispatch
from model.kernels.operations import Kernels
from optim import Assignment, HybridZero
from trainer.checkpoint import SavedOptimizer
from trainer.config import RunConfig
from trainer.engine import Engine, NativeEngine
from trainer.kernels import unchecked_kernels
from trainer.optimizer_table import table_of_run
from trainer.parallel.grid import Grid
from trainer.parallel.plan import LocalModel, build_local_model, shard_optimizer

Frequencies = Sequence[float]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Dtype of weights and activations, by `precision`."""


def build_engine(
    config: RunConfig,
    grid: Grid,
    token_frequencies: Frequencies | None = None,
    kernels: Kernels | None = None,
) -> tuple[LocalModel, Engine, SavedOptimizer]:
    """Builds the initialised model, the engine that the config names, and its optimizer.

    `token_frequencies`: as in `make_initialised_model`. `kernels`: by default `unchecked_kernels`.

    Raises ConfigError where a DeepSpeed block does not fit the number of processes.
    """
    if config.engine == "native":
        local, optimizer = build_native(config, grid, token_frequencies, kernels)
        return local, NativeEngine(local, grid, optimizer), optimizer
    from trainer.deepspeed.engine import DeepSpeedEngine  # imports deepspeed, which takes long

    local = make_initialised_model(config, grid, token_frequencies, kernels)
    engine = DeepSpeedEngine(config, local, grid, make_table(config, local))
    return local, engine, engine


def build_native(
    config: RunConfig,
    grid: Grid,
    token_frequencies: Frequencies | None = None,
    kernels: Kernels | None = None,
) -> tuple[LocalModel, HybridZero]:
    """Builds this rank's part of the model, initialised, and the native engine's optimizer."""
    local = make_initialised_model(config, grid, token_frequencies, kernels)
    return local, make_optimizer(config, local, grid, kernels)


def make_initialised_model(
    config: RunConfig,
    grid: Grid,
    token_frequencies: Frequencies | None = None,
    kernels: Kernels | None = None,
) -> LocalModel:
    """Makes this rank's part of the model with its initial weights.

    `token_frequencies`: of the ids that the tokenizer has, by which the tables of hash-routed
    layers balance the experts; None takes all ids of the vocabulary for equally frequent.
    """
    local = make_local(config, grid, kernels=kernels)
    local.model.to_empty(device=grid.device)
    counts = None
    if token_frequencies is not None:
        unused = config.model.vocab_size - len(token_frequencies)
        counts = [*token_frequencies, *[0.0] * unused]
    local.model.init_weights(config.seed, counts, local.placements)
    return local


def make_local(
    config: RunConfig,
    grid: Grid,
    dispatch: Dispatch | None = None,
    kernels: Kernels | None = None,
) -> LocalModel:
    """Makes this rank's part of the model on the meta device.

    `dispatch`: as in `build_local_model`. `kernels`: as in `build_engine`.
    """
    parallel = config.segment.parallel
    return build_local_model(
        config.model,
        DTYPES[config.precision],
        grid,
        parallel.stages(config.model, config.segment.seq_len),
        parallel.recompute,
        parallel.offload,
        fp8=config.precision == "fp8",
        kernels=kernels or unchecked_kernels(config),
        dispatch=dispatch,
    )


def make_optimizer(
    config: RunConfig, local: LocalModel, grid: Grid, kernels: Kernels | None = None
) -> HybridZero:
    """Makes the optimizer of this rank's part of the model, on the device of its weights."""
    parallel = config.segment.parallel
    return shard_optimizer(
        local,
        make_table(config, local),
        config.optim,
        grid,
        config.seed,
        parallel.max_optimizer_padding,
        parallel.grad_reduce_dtype,
        parallel.expert_grad_reduce_dtype,
        kernels or unchecked_kernels(config),
    )


def make_table(config: RunConfig, local: LocalModel) -> list[Assignment]:
    """Returns the optimizer's table of the parameters of this rank's part of the model."""
    names = [name for name, _ in local.model.named_parameters()]
    shapes = {name: local.placements[name].table_shape for name in names}
    return table_of_run(config, shapes)
