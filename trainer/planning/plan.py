"""`v4 plan`: steps, tokens, parallelism, traffic and memory of a config, before anything is run.

Imports torch only for `--dry-run`.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from data.config import DataPhase
from model.flops import flops_per_layer, training_flops
from model.parameters import parameter_counts, parameter_table
from optim.partition import render_table
from trainer.config import ConfigError, Phase, Recipe, RunConfig, short_length
from trainer.formatting import GIB, duration, gib, short
from trainer.metrics import read_metrics
from trainer.optimizer_table import table_of_run
from trainer.parallel.degrees import DENSE_AXES, EXPERT_AXES, Degrees, coordinates_of
from trainer.parallel.stage_plan import StagePlan
from trainer.planning.static_memory import (
    PipelineRankMemory,
    fullest_parts,
    memory_by_pipeline_rank,
    owner_tables,
    snapshot_bytes,
)
from trainer.planning.traffic import GradientReduction, Work, step_traffic

if TYPE_CHECKING:
    from trainer.planning.dry_run import DryRun, RankMemory

UTILISATION = 0.4
"""MFU that is assumed before a run has been measured."""
MAX_RANKS = 64
"""Ranks whose coordinates are listed."""
COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send")


def describe_plan(
    config: RunConfig,
    world_size: int,
    dry: bool = False,
    phase: int | None = None,
    parameters: bool = False,
) -> Iterator[Table | str]:
    """Yields tables of the run, its phases, ranks, stages, optimizer, traffic and memory.

    With `dry` memory includes activations: those of the run's `phase`, by default of the one with
    the largest microbatches. With `parameters` the optimizer's table of all parameters is among
    the tables. Raises ConfigError if the config does not fit the processes, or trains with another
    engine than the native one.
    """
    if config.engine != "native":
        raise ConfigError(f"engine = {config.engine}: v4 plan supports engine = native only")
    degrees = config.degrees(world_size)
    phases = config.recipe.phases
    if phase is not None and not 0 <= phase < len(phases):
        raise ConfigError(f"phase {phase} should be one of the run's, 0 to {len(phases) - 1}")
    yield summary(config, degrees)
    if config.fit_to_memory:
        yield (
            "fit_to_memory: training chooses data.micro_batch_size, parallel.recompute and "
            "parallel.offload for its device; this plan takes them as written."
        )
    yield from recipe_part(config, degrees)
    if world_size > 1:
        yield rank_table(degrees)
    if degrees.pipeline > 1:
        yield stage_table(config)
    if parameters:
        table = parameter_table(config.model)
        shapes = {name: line.shape for name, line in table.items()}
        yield render_table(table_of_run(config, shapes))
    memory = memory_by_pipeline_rank(config, degrees)
    yield from owner_tables(memory)
    if world_size > 1:
        yield traffic_of(config, degrees)
    if not dry:
        yield memory_table(config, memory)
        return
    from trainer.planning.dry_run import count_memory

    result = count_memory(config, world_size, _Progress(), phase)
    yield dry_run_table(result)
    yield dry_run_summary(result)


def summary(config: RunConfig, degrees: Degrees) -> Table:
    """Returns steps, tokens, parameters and the degrees of all axes."""
    counts = parameter_counts(config.model)
    phases = config.recipe.phases
    step_tokens = max(s.rows.global_batch_size * s.rows.seq_len for s in phases)
    largest = config.recipe.largest.rows
    table = Table(title=f"{config.run_dir}", show_header=False, title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    rows_of_rank = math.ceil(largest.global_batch_size / degrees.data)
    for name, value in (
        ("processes", f"{degrees.world_size:,}"),
        *(
            (" x ".join(axes), " x ".join(map(str, degrees.of(axes))))
            for axes in (DENSE_AXES, EXPERT_AXES)
        ),
        ("steps", f"{config.recipe.steps:,}"),
        ("tokens per step, max", f"{step_tokens:,}"),
        ("tokens in total, max", f"{sum(phase.tokens for phase in phases):,}"),
        (
            "microbatches per step on a process",
            f"{math.ceil(rows_of_rank / largest.micro_batch_size):,}",
        ),
        ("parameters", f"{counts.total:,}"),
        ("  active per token, without MTP", f"{counts.active:,}"),
        ("  in the MTP block", f"{counts.mtp:,}"),
    ):
        table.add_row(name, value)
    return table


def recipe_part(config: RunConfig, degrees: Degrees) -> Iterator[Table | str]:
    """Yields the run's phases with steps, tokens and times, and the basis of the times."""
    recipe = config.recipe
    speed, basis = expected_flops_per_second(config, degrees)
    table = Table(title="phases", title_justify="left")
    names = ("phase", "name", "steps", "tokens", "until token", "rows x length")
    for name in (*names, "learning rate", "MTP weight", "time"):
        table.add_column(name, justify="left" if name == "name" else "right")
    until, total = 0, 0.0
    for phase in recipe.phases:
        flops = phase_flops(config, phase)
        until, total = until + phase.tokens, total + flops
        table.add_row(
            f"phase {phase.number}",
            phase.name or "the whole run",
            f"{phase.steps:,}",
            short(phase.tokens),
            short(until),
            format_rows(phase.rows),
            format_learning_rates(recipe, phase),
            f"{recipe.mtp_loss_weight(phase.end - 1):g}",
            "?" if speed is None else duration(flops / speed),
        )
    if len(recipe.phases) > 1 and speed is not None:
        table.add_section()
        table.add_row("total", "", f"{recipe.steps:,}", *[""] * 5, duration(total / speed))
    yield table
    yield basis
    yield from recipe.warnings()


def phase_flops(config: RunConfig, phase: Phase) -> float:
    """Returns the FLOPs of a phase if every row is one sample."""
    of_row = training_flops(config.model, [phase.rows.seq_len], attention=phase.attention)
    return of_row * (phase.tokens // phase.rows.seq_len)


def expected_flops_per_second(config: RunConfig, degrees: Degrees) -> tuple[float | None, str]:
    """Returns FLOP/s of all processes together, and a sentence about the source of that number."""
    path = config.run_dir / "metrics.jsonl"
    records = read_metrics(path)[-100:] if path.is_file() else []
    speeds = sorted(x for r in records if (x := r.get("tflops_per_second")) is not None)
    if speeds:
        speed = speeds[len(speeds) // 2]
        return speed * 1e12, f"Times at {speed:.3g} TFLOP/s, the median of the run's last steps."
    if (peak := config.metrics.peak_tflops) is not None:
        rate = UTILISATION * peak * degrees.world_size
        return rate * 1e12, (
            f"Times at {UTILISATION:.0%} of metrics.peak_tflops = {peak:g} on "
            f"{degrees.world_size:,} processes; the run has no measured steps yet."
        )
    return None, "Times need metrics.peak_tflops, or a run with measured steps."


def format_rows(rows: DataPhase) -> str:
    """Formats rows x length: `4 to 8 x 512` for a ramp to eight rows."""
    ramp = "" if rows.initial_batch_size is None else f"{rows.initial_batch_size:,} to "
    return f"{ramp}{rows.global_batch_size:,} x {short_length(rows.seq_len)}"


def format_learning_rates(recipe: Recipe, phase: Phase) -> str:
    """Formats the learning rates of the first, the middle and the last step."""
    steps = (phase.first, (phase.first + phase.end) // 2, phase.end - 1)
    return ", ".join(dict.fromkeys(f"{recipe.learning_rate(step):.3g}" for step in steps))


def stage_table(config: RunConfig) -> Table:
    """Returns the layers of each pipeline stage and its share of a row's FLOPs."""
    length = config.recipe.seq_len
    stages = config.parallel.stages(config.model, length)
    shares = stage_shares(stages, *flops_per_layer(config.model, length))
    rank_of = {
        number: rank for rank in range(stages.num_ranks) for number in stages.stages_of(rank)
    }
    table = Table(title="stages", title_justify="left")
    for name in ("stage", "pipeline rank", "layers", "kinds", "FLOPs"):
        table.add_column(name, justify="left" if name == "kinds" else "right")
    for number, share in enumerate(shares):
        layers = stages.layers_of(number)
        counts = Counter(config.model.layer_types[layer] for layer in layers)
        kinds = [f"{count} {kind}" for kind, count in counts.items()]
        kinds += ["heads"] if stages.is_last(number) else []
        table.add_row(
            str(number), str(rank_of[number]), span(layers), ", ".join(kinds), f"{share:.2%}"
        )
    return table


def stage_shares(stages: StagePlan, costs: list[float], tail: float) -> list[float]:
    """Returns each stage's share of the cost of all layers and of the `tail` after them."""
    of_stage = [
        sum(costs[layer] for layer in stages.layers_of(number)) + tail * stages.is_last(number)
        for number in range(len(stages.layer_counts))
    ]
    return [cost / (sum(costs) + tail) for cost in of_stage]


def rank_table(degrees: Degrees) -> Table:
    """Returns the coordinates of the first ranks on every axis."""
    names = [*DENSE_AXES, *EXPERT_AXES[:-1]]
    table = Table(title="ranks", title_justify="left")
    for name in ("rank", *names):
        table.add_column(name, justify="right")
    for rank in range(min(degrees.world_size, MAX_RANKS)):
        coordinates = coordinates_of(rank, DENSE_AXES, degrees)
        coordinates |= coordinates_of(rank, EXPERT_AXES, degrees)
        table.add_row(str(rank), *(str(coordinates[name]) for name in names))
    if degrees.world_size > MAX_RANKS:
        table.add_row("…", *[""] * len(names))
    return table


def traffic_of(config: RunConfig, degrees: Degrees) -> Table | str:
    """Returns the bytes sent per step by the first rank of the pipeline rank that sends most.

    In the phase with the largest microbatches; rows are one sample each and routing is even.
    """
    phase = config.recipe.largest
    if phase.attention == "warmup":
        return f"Traffic has no formula for the warm-up of the indexers, phase {phase.number}."
    rows, parallel = phase.rows, config.parallel
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
    stages = parallel.stages(config.model, config.recipe.seq_len)
    first_ranks = range(0, degrees.world_size, degrees.world_size // degrees.pipeline)
    try:
        by_rank = {
            rank: step_traffic(config.model, degrees, stages, rank, work, config.optim, reduction)
            for rank in first_ranks
        }
    except ValueError as error:
        return f"Traffic: {error}."
    rank = max(by_rank, key=lambda rank: sum(by_rank[rank].values()))
    where = f", phase {phase.number}, {phase.name}" if phase.name else ""
    return traffic_table(by_rank[rank], f"sent by rank {rank} per step{where}")


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
    """Returns a sentence about the sum of all parameters and the fullest rank."""
    full = result.fullest
    update = ""
    if full.update > full.passes:
        update = " during the optimizer's step"
    return (
        f"All processes together hold {result.parameters:,} parameters, each counted once. The "
        f"fullest is rank {full.rank} on pipeline rank {full.pipeline}: peak {gib(full.total)}"
        f"{update}, of which {gib(sum(full.resident.values()))} throughout the run."
    )


def similar_ranks(result: DryRun) -> Iterator[list[RankMemory]]:
    """Yields the ranks of the dry run; those of a pipeline rank with equal totals together."""
    for pipeline in range(result.degrees.pipeline):
        ranks = [rank for rank in result.ranks if rank.pipeline == pipeline]
        same = [rank for rank in ranks if abs(rank.total / ranks[0].total - 1) < 1e-3]
        yield same
        yield from ([rank] for rank in ranks if rank not in same)


def span(numbers: Iterable[int]) -> str:
    """Formats consecutive numbers by the first and the last: `3-7`; nothing for none."""
    numbers = list(numbers)
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    return f"{numbers[0]}-{numbers[-1]}"


class _Progress:
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
