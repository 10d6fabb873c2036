"""Assigns layers to pipeline stages, and stages to ranks. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from model.config import ModelConfig

ScheduleName = Literal["1f1b", "interleaved_1f1b", "zero_bubble_v", "dual_pipe_v"]
V_SHAPED = ("zero_bubble_v", "dual_pipe_v")


@dataclass(frozen=True)
class StagePlan:
    """The layers of every pipeline stage, and the stages of every rank.

    Attributes:
        schedule: the order in which ranks run forward and backward of microbatches.
        layer_counts: the number of layers of each stage, in order.
        num_ranks: the number of pipeline ranks.
    """

    schedule: ScheduleName
    layer_counts: tuple[int, ...]
    num_ranks: int

    def stages_of(self, rank: int) -> list[int]:
        """Returns the stages of a pipeline rank: a loop over ranks, or a V (down and up again)."""
        stages = len(self.layer_counts)
        if self.schedule in V_SHAPED:
            return [rank, stages - 1 - rank]
        return list(range(rank, stages, self.num_ranks))

    def layers_of(self, stage: int) -> range:
        """Returns the indices of a stage's layers."""
        first = sum(self.layer_counts[:stage])
        return range(first, first + self.layer_counts[stage])

    def is_last(self, stage: int) -> bool:
        """Whether a stage is the last one, which has the output head."""
        return stage == len(self.layer_counts) - 1


def balance_layers(costs: Sequence[float], output_cost: float, num_stages: int) -> tuple[int, ...]:
    """Returns layer counts per stage that minimise the cost of the most expensive stage.

    Each stage but the last has at least one layer; `output_cost` is the cost of the last stage's
    norm, heads and MTP block. Ties go to the division whose early stages have fewer layers.

    Raises:
        ValueError: there are too few layers.
    """
    layers = len(costs)
    if layers < num_stages - 1:
        raise ValueError(f"{layers} layers for {num_stages} stages")
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    # best[n]: the smallest maximum cost, and the counts, where the first stages hold n layers.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(num_stages):
        last = stage == num_stages - 1
        ends = [layers] if last else range(stage + 1, layers + 1)
        best = {
            end: min(
                (
                    max(highest, prefix[end] - prefix[start] + output_cost * last),
                    (*counts, end - start),
                )
                for start, (highest, counts) in best.items()
                if start + (not last) <= end
            )
            for end in ends
        }
    return best[layers][1]


def plan_stages(
    config: ModelConfig,
    seq_len: int,
    num_ranks: int,
    schedule: ScheduleName,
    stages_per_rank: int,
    layers: Sequence[int] | None = None,
) -> StagePlan:
    """Returns the stages of a model: as given by `layers`, or balanced by the FLOPs of each layer.

    `layers` are the layer counts of the stages.

    Raises:
        ValueError: there are too few layers.
    """
    if layers is None:
        from model.flops import flops_per_layer  # imports numpy

        costs, output_cost = flops_per_layer(config, seq_len)
        layers = balance_layers(costs, output_cost, num_ranks * stages_per_rank)
    return StagePlan(schedule, tuple(layers), num_ranks)


def embedding_is_replicated(stages: StagePlan, num_mtp: int) -> bool:
    """Whether first and last pipeline rank both hold the embedding and must sum its gradients."""
    last = len(stages.layer_counts) - 1
    on_one_rank = any({0, last} <= set(stages.stages_of(rank)) for rank in range(stages.num_ranks))
    return num_mtp > 0 and not on_one_rank
