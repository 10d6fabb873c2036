"""Tables of the memory of processes, for `v4 plan`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from trainer.config import RunConfig
from trainer.formatting import GIB, gib, span
from trainer.planning.static_memory import (
    PipelineRankMemory,
    checkpoint_copy_bytes,
    fullest_parts,
    snapshot_bytes,
)

if TYPE_CHECKING:
    from trainer.planning.dry_run import DryRun, RankMemory


def memory_table(config: RunConfig, pipeline_ranks: Sequence[PipelineRankMemory]) -> Table:
    """Returns the memory that the fullest process holds throughout the run."""
    table = Table(title="memory of the fullest process", show_header=False, title_justify="left")
    table.add_column("part")
    table.add_column("size", justify="right")
    parts = fullest_parts(pipeline_ranks)
    for name, size in parts.items():
        table.add_row(name, gib(size))
    table.add_section()
    table.add_row("total without activations (see --dry-run)", gib(sum(parts.values())))
    if size := snapshot_bytes(config, pipeline_ranks, page_locked=config.device != "cpu"):
        table.add_row("host memory: snapshots of stability.spikes", gib(size))
    if size := checkpoint_copy_bytes(config, pipeline_ranks):
        table.add_row("host memory: a checkpoint while it is written, at most", gib(size))
    return table


def dry_run_table(result: DryRun) -> Table:
    """Returns memory by pipeline rank and part."""
    unit, name = (GIB, "GiB") if result.fullest.total >= GIB else (2**20, "MiB")
    where = f", phase {result.phase.number}, {result.phase.name}" if result.phase.name else ""
    table = Table(title=f"memory of a process, {name}{where}", title_justify="left")
    names = [*result.ranks[0].resident, "microbatches", "in flight", "activations", "workspace"]
    for name in ("ranks", "layers", "parameters", *names, "total"):
        table.add_column(name, justify="right")
    for ranks in similar_ranks(result):
        one = max(ranks, key=lambda rank: rank.total)
        sizes = [one.microbatches, one.activations, one.workspace, one.total]
        values = [f"{size / unit:.2f}" for size in (*one.resident.values(), *sizes)]
        flight = "+".join(str(stage.in_flight) for stage in one.stages)
        values.insert(len(one.resident) + 1, flight)
        layers = " ".join(span(stage.layers) for stage in one.stages)
        numbers = ", ".join(str(rank.rank) for rank in ranks)
        table.add_row(numbers, layers, f"{one.parameters:,}", *values)
    return table


def dry_run_summary(result: DryRun) -> str:
    """Returns sentences about all parameters, the fullest rank, and what the table leaves out."""
    full = result.fullest
    update = ""
    if full.update > full.passes:
        update = " during the optimizer's step"
    summary = (
        f"All processes together hold {result.parameters:,} parameters, each counted once. The "
        f"fullest is rank {full.rank} on pipeline rank {full.pipeline}: peak {gib(full.total)}"
        f"{update}, of which {gib(sum(full.resident.values()))} throughout the run."
    )
    if result.triton:
        summary += f" Where Triton's attention runs, its backward takes {gib(result.triton)} more."
    if offloaded := max(rank.offloaded for rank in result.ranks):
        summary += f" Offloaded activations take {gib(offloaded)} of page-locked host memory."
    return summary


def similar_ranks(result: DryRun) -> Iterator[list[RankMemory]]:
    """Yields the ranks of the dry run; those of a pipeline rank with equal totals together."""
    for pipeline in range(result.degrees.pipeline):
        ranks = [rank for rank in result.ranks if rank.pipeline == pipeline]
        same = [rank for rank in ranks if abs(rank.total / ranks[0].total - 1) < 1e-3]
        yield same
        yield from ([rank] for rank in ranks if rank not in same)


class Progress:
    """Progress of a dry run on stderr; on a terminal the line is rewritten."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        print("dry run: counting ranks", file=sys.stderr, flush=True)

    def __call__(self, done: int, of: int) -> None:
        spent = time.monotonic() - self._start
        text = f"dry run: {done} of {of} ranks, {spent:.0f} s"
        if done < of:
            text += f", about {spent / done * (of - done):.0f} s left"
        if sys.stderr.isatty():
            print(f"\r{text:<60}", end="\n" if done == of else "", file=sys.stderr, flush=True)
        elif done == of:
            print(text, file=sys.stderr, flush=True)
