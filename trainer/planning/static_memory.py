"""Memory that processes hold throughout a run, in closed form: from the table of parameters,
placements and the optimizer's layout. Answers for thousands of ranks and imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.config import ModelConfig
from model.kernels.workspaces import attention_bytes, objective_bytes, selection_bytes
from model.parameters import Parameter, parameter_table, split_name, tensors_of
from optim import build_table
from optim.zero import Load, LoadSummary, page_locked_bytes
from trainer.config import RunConfig
from trainer.parallel.degrees import Degrees
from trainer.parallel.placement import placements_of
from trainer.parallel.stage_plan import StagePlan, embedding_is_replicated
from trainer.parallel.zero_layout import GroupKind, ShardGroup, shard_groups, stage_loads

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class PipelineRankMemory:
    """Memory of the ranks that share a pipeline coordinate, over all their stages.

    Attributes:
        groups: parameters by the ranks that hold the same shard of them.
        loads: for each rank of this pipeline rank, the optimizer's state and work by group.
        weights, gradients: bytes on every rank.
        unmastered: bytes of weights and buffers without an fp32 master in the optimizer.
        unmastered_locked: page-locked bytes of the host for copies of them.
        quantised: bytes of the experts' quantised copies; None without quantised phases.
    """

    groups: list[ShardGroup]
    loads: list[dict[tuple[GroupKind, bool], Load]]
    weights: int
    gradients: int
    unmastered: int
    unmastered_locked: int
    quantised: int | None

    def parts(self, rank: int) -> dict[str, int]:
        """Returns the bytes by part of a rank, given by its number within the pipeline rank."""
        masters = states = 0
        for (_, is_low_precision), load in self.loads[rank].items():
            # fp32 parameters are their own masters, except matrices that ranks shard.
            masters += 4 * (load.muon + load.adamw if is_low_precision else load.gathered)
            states += 4 * (
                load.muon + 2 * load.adamw + load.adamw_slices
            )  # each slice has a step count
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "master weights": masters,
            "optimizer states": states,
        }
        if self.quantised is not None:
            parts["quantised experts"] = self.quantised
        return parts

    def snapshot(self, rank: int, page_locked: bool) -> int:
        """Returns the bytes of a snapshot of a rank, which holds everything that a resume needs.

        `page_locked`: of memory that a GPU can write.
        """
        low = [load for (_, is_low_precision), load in self.loads[rank].items() if is_low_precision]
        if page_locked:
            states = sum(load.locked_states for load in self.loads[rank].values())
            return self.unmastered_locked + sum(load.locked_masters for load in low) + states
        masters = sum(4 * (load.muon + load.adamw) for load in low)
        return self.unmastered + masters + self.parts(rank)["optimizer states"]

    @property
    def fullest(self) -> int:
        """The rank with most bytes, by its number within the pipeline rank."""
        return max(range(len(self.loads)), key=lambda rank: sum(self.parts(rank).values()))

    def max_snapshot(self, page_locked: bool) -> int:
        """Returns the bytes of the largest snapshot."""
        return max(self.snapshot(rank, page_locked) for rank in range(len(self.loads)))


def stage_tensors(model: ModelConfig, stages: StagePlan, rank: int) -> dict[str, Parameter]:
    """Returns the parameters and buffers of a pipeline rank's stages by name."""
    numbers = stages.stages_of(rank)
    layers = {f"layers.{layer}." for number in numbers for layer in stages.layers_of(number)}
    is_last = any(stages.is_last(number) for number in numbers)
    has_embedding = 0 in numbers or (is_last and model.num_nextn_predict_layers > 0)

    def is_local(name: str) -> bool:
        if name.startswith("layers."):
            return split_name(name)[0] in layers
        return has_embedding if name == "embed.weight" else is_last

    return {line.name: line for line in tensors_of(model) if is_local(line.name)}


def pipeline_rank_memory(config: RunConfig, degrees: Degrees, pipeline: int) -> PipelineRankMemory:
    """Computes the memory of the ranks of one pipeline rank."""
    stages = config.segment.parallel.stages(config.model, config.segment.seq_len)
    tensors = stage_tensors(config.model, stages, pipeline)
    shapes = {name: line.shape for name, line in tensors.items()}
    placements = placements_of(shapes, degrees, pipeline * (degrees.world_size // degrees.pipeline))
    bytes_of_dtype = {"weights": 4 if config.precision == "fp32" else 2, "fp32": 4, "int64": 8}
    elements = {name: math.prod(placement.local_shape) for name, placement in placements.items()}
    sizes_of = {n: elements[n] * bytes_of_dtype[line.spec.dtype] for n, line in tensors.items()}
    trained = [name for name, line in tensors.items() if line.spec.group is not None]
    low_precision = {name for name in trained if sizes_of[name] < 4 * elements[name]}
    groups = shard_groups(
        build_table(
            {name: placements[name].table_shape for name in trained},
            parameter_table(config.model),
            config.optim,
        ),
        placements,
        low_precision,
        degrees,
        embedding_is_replicated(stages, config.model.num_nextn_predict_layers),
        config.optim.muon,
        config.segment.parallel.max_optimizer_padding,
    )
    quantised = None
    if any(phase.quantised for phase in config.segment.phases):
        quantised = sum(sizes_of[name] for name in trained if placements[name].kind == "expert")
    return PipelineRankMemory(
        groups,
        stage_loads(groups, degrees, pipeline, config.optim.muon),
        sum(sizes_of.values()),
        4 * sum(elements[name] for name in trained),
        sum(size for name, size in sizes_of.items() if name not in low_precision),
        sum(page_locked_bytes(sizes_of[name]) for name in sizes_of if name not in low_precision),
        quantised,
    )


def memory_by_pipeline_rank(config: RunConfig, degrees: Degrees) -> list[PipelineRankMemory]:
    """Computes the memory of all ranks, by pipeline rank."""
    return [pipeline_rank_memory(config, degrees, rank) for rank in range(degrees.pipeline)]


def fullest_parts(pipeline_ranks: Sequence[PipelineRankMemory]) -> dict[str, int]:
    """Returns the bytes by part of the rank with most of them."""
    fullest = (each.parts(each.fullest) for each in pipeline_ranks)
    return max(fullest, key=lambda parts: sum(parts.values()))


def memory_parts(config: RunConfig, degrees: Degrees) -> dict[str, int]:
    """Returns the bytes by part that the fullest process holds throughout the run.

    `trainer.planning.dry_run` counts the same on the objects of training; a test compares them.
    """
    return fullest_parts(memory_by_pipeline_rank(config, degrees))


def snapshot_bytes(
    config: RunConfig, pipeline_ranks: Sequence[PipelineRankMemory], page_locked: bool
) -> int:
    """Returns the bytes of host memory that snapshots for rollbacks take in the fullest process.

    `page_locked`: as they are where the process has a GPU.
    """
    spikes = config.stability.spikes
    if spikes is None:
        return 0
    return spikes.snapshots * max(each.max_snapshot(page_locked) for each in pipeline_ranks)


def snapshot_memory(config: RunConfig, degrees: Degrees, page_locked: bool = False) -> int:
    """Returns `snapshot_bytes` of a run on a grid of these degrees."""
    spikes = config.stability.spikes
    if spikes is None or not spikes.snapshots:
        return 0
    return snapshot_bytes(config, memory_by_pipeline_rank(config, degrees), page_locked)


def checkpoint_copy_bytes(config: RunConfig, pipeline_ranks: Sequence[PipelineRankMemory]) -> int:
    """Returns the host memory of the fullest process for a checkpoint that is being written.

    At most: what several ranks hold one of them writes, but each is counted as if it wrote it. 0
    where steps stop instead, or only the last checkpoint is saved.
    """
    every = config.checkpoint.every
    if not config.may_save_async or not 0 < every < config.recipe.steps:
        return 0
    return max(each.max_snapshot(page_locked=False) for each in pipeline_ranks)


def checkpoint_copy_memory(config: RunConfig, degrees: Degrees) -> int:
    """Returns `checkpoint_copy_bytes` of a run on a grid of these degrees."""
    return checkpoint_copy_bytes(config, memory_by_pipeline_rank(config, degrees))


def triton_workspace(config: RunConfig, degrees: Degrees) -> int:
    """Returns the most bytes that a Triton kernel takes and the eager version does not.

    That is attention's backward, or the indexer's selection or objective, of which no two run at
    the same time; 0 where the config excludes the kernels.
    """
    if config.precision == "fp32" or config.device == "cpu":
        return 0
    model, rows = config.model, [phase.rows for phase in config.segment.phases]
    tokens = max(each.micro_batch_size * each.seq_len for each in rows) // degrees.context
    longest = max(each.seq_len for each in rows)
    selects = "csa" in model.layer_types and longest // model.csa_compress_ratio > model.index_topk
    selected = model.index_topk if selects else 0
    sizes = [0]
    if config.kernel_setting("attention") in ("auto", "triton", "flash_mla"):
        heads = model.num_attention_heads // degrees.tensor
        sizes.append(attention_bytes(tokens, heads, model.head_dim, selected))
    if selects and config.kernel_setting("indexer") in ("auto", "triton"):
        sizes.append(selection_bytes(tokens, selected))
    if "csa" in model.layer_types and config.kernel_setting("indexer_loss") in ("auto", "triton"):
        entries = tokens * degrees.context // model.csa_compress_ratio
        modes = {phase.attention for phase in config.segment.phases}
        counts = {0} if "warmup" in modes else set()
        counts |= {selected} if "sparse" in modes else set()
        sizes += [objective_bytes(tokens, entries, model.index_head_dim, k) for k in counts]
    return max(sizes)


def owner_tables(pipeline_ranks: Sequence[PipelineRankMemory]) -> Iterator[Table | str]:
    """Yields the owners of the optimizer's state, and the load of a rank: min, mean and max."""
    from rich.table import Table  # only `v4 plan` needs it

    table = Table(title="owners of the optimizer's state", title_justify="left")
    for name in ("pipeline rank", "parameters", "precision"):
        table.add_column(name)
    for name in ("matrices", "ranks", "owners", "replicas", "padding"):
        table.add_column(name, justify="right")
    loads = []
    for pipeline, memory in enumerate(pipeline_ranks):
        loads += [sum(rank.values(), Load()) for rank in memory.loads]
        for group in memory.groups:
            matrices = sum(p.matrix_count for p in group.local_parameters if p.assignment.matrices)
            table.add_row(
                str(pipeline),
                group.kind,
                "bf16" if group.is_low_precision else "fp32",
                f"{matrices:,}",
                f"{group.num_ranks:,}",
                f"{group.layout.owners:,}",
                f"{group.replicas:,}",
                f"{group.layout.padding:.1%}",
            )
    summary = LoadSummary(loads)
    yield table
    yield summary.table()
    yield summary.sentence()
