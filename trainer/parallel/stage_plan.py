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
        layers: the number of layers of each stage, in order.
        ranks: the number of pipeline ranks.
    """

    schedule: ScheduleName
    layers: tuple[int, ...]
    ranks: int

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a pipeline rank: a loop over ranks, or a V (down and up again)."""
        stages = len(self.layers)
        if self.schedule in V_SHAPED:
            return [rank, stages - 1 - rank]
        return list(range(rank, stages, self.ranks))

    def layers_of(self, stage: int) -> range:
        """The numbers of a stage's layers."""
        first = sum(self.layers[:stage])
        return range(first, first + self.layers[stage])

    def is_last(self, stage: int) -> bool:
        """Whether a stage is the last one, which has the output head."""
        return stage == len(self.layers) - 1


def balanced(costs: Sequence[float], tail: float, stages: int) -> tuple[int, ...]:
    """The number of layers of each stage that minimises the cost of the most expensive stage.

    Each stage but the last has at least one layer; `tail` is the cost of the last stage's norm,
    heads and MTP block. Ties go to the division whose early stages have fewer layers.

    Raises:
        ValueError: there are too few layers.
    """
    layers = len(costs)
    if layers < stages - 1:
        raise ValueError(f"{layers} layers for {stages} stages")
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    # best[n]: the smallest maximum cost, and the counts, where the first stages hold n layers.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(stages):
        last = stage == stages - 1
        ends = [layers] if last else range(stage + 1, layers + 1)
        best = {
            end: min(
                (max(highest, prefix[end] - prefix[start] + tail * last), (*counts, end - start))
                for start, (highest, counts) in best.items()
                if start + (not last) <= end
            )
            for end in ends
        }
    return best[layers][1]


def plan_stages(
    config: ModelConfig,
    seq_len: int,
    ranks: int,
    schedule: ScheduleName,
    chunks: int,
    layers: Sequence[int] | None = None,
) -> StagePlan:
    """The stages of a model: as given by `layers`, or balanced by the FLOPs of each layer.

    `chunks` is the number of stages of a rank.

    Raises:
        ValueError: there are too few layers.
    """
    if layers is None:
        from model.flops import flops_per_layer  # imports numpy

        costs, tail = flops_per_layer(config, seq_len)
        layers = balanced(costs, tail, ranks * chunks)
    return StagePlan(schedule, tuple(layers), ranks)


def tied_embedding(stages: StagePlan, mtp: int) -> bool:
    """Whether first and last pipeline rank both hold the embedding and must sum its gradients."""
    last = len(stages.layers) - 1
    together = any({0, last} <= set(stages.stages_of(rank)) for rank in range(stages.ranks))
    return mtp > 0 and not together
