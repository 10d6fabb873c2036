"""Which layers every pipeline stage has, and which stages every rank. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from model.config import ModelConfig

ScheduleName = Literal["1f1b", "interleaved_1f1b", "zero_bubble_v", "dual_pipe_v"]
V_SHAPED = ("zero_bubble_v", "dual_pipe_v")


@dataclass(frozen=True)
class StagePlan:
    """Which layers every stage of the pipeline has, and which stages every rank.

    Attributes:
        schedule: the order of work.
        layers: number of layers of each stage, in order.
        ranks: pipeline ranks.
    """

    schedule: ScheduleName
    layers: tuple[int, ...]
    ranks: int

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a pipeline rank: in a loop, or down and up again ("v")."""
        stages = len(self.layers)
        if self.schedule in ("zero_bubble_v", "dual_pipe_v"):
            return [rank, stages - 1 - rank]
        return list(range(rank, stages, self.ranks))

    def layers_of(self, stage: int) -> range:
        """The numbers of a stage's layers."""
        first = sum(self.layers[:stage])
        return range(first, first + self.layers[stage])

    def is_last(self, stage: int) -> bool:
        """Whether a stage has the heads."""
        return stage == len(self.layers) - 1


def balanced(costs: Sequence[float], tail: float, stages: int) -> tuple[int, ...]:
    """How many layers each stage gets, so that the dearest stage is as cheap as can be.

    Each stage but the last has a layer at least; `tail` is the cost of what the last one has
    besides. Of equally good divisions it takes the one whose early stages have fewer layers.

    Raises ValueError where there are too few layers.
    """
    layers = len(costs)
    if layers < stages - 1:
        raise ValueError(f"{layers} layers for {stages} stages")
    upto = [0.0]
    for cost in costs:
        upto.append(upto[-1] + cost)
    # best[n]: cheapest dearest stage, and counts, when the first stages hold the first n layers.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(stages):
        last = stage == stages - 1
        ends = [layers] if last else range(stage + 1, layers + 1)
        best = {
            end: min(
                (max(dearest, upto[end] - upto[start] + tail * last), (*counts, end - start))
                for start, (dearest, counts) in best.items()
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
    """The stages of a model: as `layers` says, or balanced by the operations of each part.

    `chunks` is how many stages a rank has. Raises ValueError where layers do not suffice.
    """
    if layers is None:
        from model.flops import flops_by_part  # imports numpy

        costs, tail = flops_by_part(config, seq_len)
        layers = balanced(costs, tail, ranks * chunks)
    return StagePlan(schedule, tuple(layers), ranks)


def tied_embedding(stages: StagePlan, mtp: int) -> bool:
    """Whether first and last pipeline rank both hold the embedding and must share gradients."""
    last = len(stages.layers) - 1
    together = any({0, last} <= set(stages.stages_of(rank)) for rank in range(stages.ranks))
    return mtp > 0 and not together
