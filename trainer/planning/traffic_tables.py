"""Tables of the bytes that processes send in a step, for `v4 plan`. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.table import Table

from trainer.config import Phase, RunConfig
from trainer.formatting import GIB
from trainer.parallel.degrees import Degrees
from trainer.planning.traffic import GradientReduction, Work, step_traffic

COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send")


def traffic_of(config: RunConfig, degrees: Degrees) -> Table | str:
    """Returns the bytes sent per step by the first rank of the pipeline rank that sends most.

    In the segment's phase with the largest microbatches.
    """
    phase = config.segment.largest
    sent = traffic_of_phase(config, degrees, phase)
    if isinstance(sent, str):
        return sent
    where = f", phase {phase.number}, {phase.name}" if phase.name else ""
    return traffic_table(sent[1], f"sent by rank {sent[0]} per step{where}")


def traffic_of_phase(
    config: RunConfig, degrees: Degrees, phase: Phase
) -> tuple[int, Mapping[tuple[str, str], int]] | str:
    """Returns the rank that sends most, and its bytes per step; or why there is no formula.

    Of the first ranks of the pipeline ranks; rows are one sample each and routing is even.
    """
    if phase.attention == "warmup":
        return f"Traffic has no formula for the warm-up of the indexers, phase {phase.number}."
    rows, parallel = phase.rows, config.segment.parallel
    work = Work.whole_rows(
        rows.seq_len,
        rows.micro_batch_size,
        math.ceil(rows.global_batch_size / degrees.data / rows.micro_batch_size),
        "fp32" if config.precision == "fp32" else "bf16",
        parallel.recompute,
        phase.attention,
    )
    reduction = GradientReduction(
        parallel.grad_reduce_dtype,
        parallel.expert_grad_reduce_dtype,
        parallel.max_optimizer_padding,
    )
    stages = parallel.stages(config.model, config.segment.seq_len)
    first_ranks = range(0, degrees.world_size, degrees.world_size // degrees.pipeline)
    try:
        by_rank = {
            rank: step_traffic(config.model, degrees, stages, rank, work, config.optim, reduction)
            for rank in first_ranks
        }
    except ValueError as error:
        return f"Traffic: {error}."
    rank = max(by_rank, key=lambda rank: sum(by_rank[rank].values()))
    return rank, by_rank[rank]


def traffic_table(sent: Mapping[tuple[str, str], int], title: str) -> Table:
    """Returns the bytes sent by axis and collective.

    `stage/8` is the optimizer's traffic within groups of 8 owners of a pipeline stage, `stage*2`
    the all-reduce over 2 such groups.
    """
    unit, name = (GIB, "GiB") if sum(sent.values()) >= GIB else (2**20, "MiB")
    table = Table(title=f"{title}, {name}", title_justify="left")
    table.add_column("axis")
    for name in (*COLLECTIVES, "total"):
        table.add_column(name.replace("_", "-"), justify="right")

    def add(name: str, sizes: Sequence[int]) -> None:
        cells = [f"{size / unit:,.2f}" if size else "" for size in (*sizes, sum(sizes))]
        table.add_row(name, *cells)

    for axis in dict.fromkeys(axis for axis, _ in sent):
        add(axis, [sent.get((axis, name), 0) for name in COLLECTIVES])
    table.add_section()
    totals = [sum(n for (_, other), n in sent.items() if other == name) for name in COLLECTIVES]
    add("total", totals)
    return table
