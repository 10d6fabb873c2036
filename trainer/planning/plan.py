"""`v4 plan`: steps, tokens, parallelism, traffic and memory of a config, before anything is run.

Imports torch only for `--dry-run`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from data.config import DataPhase
from model.flops import flops_per_layer, training_flops
from model.parameters import parameter_counts, parameter_table
from optim.partition import render_table
from trainer.config import ConfigError, Phase, Recipe, RunConfig, Segment, short_length
from trainer.formatting import duration, gib, short, span
from trainer.metrics import read_metrics
from trainer.optimizer_table import table_of_run
from trainer.parallel.degrees import DENSE_AXES, EXPERT_AXES, Degrees, coordinates_of
from trainer.parallel.stage_plan import StagePlan
from trainer.planning.memory_tables import (
    Progress,
    dry_run_summary,
    dry_run_table,
    memory_table,
)
from trainer.planning.static_memory import (
    memory_by_pipeline_rank,
    memory_parts,
    owner_tables,
)

if TYPE_CHECKING:
    pass
from trainer.planning.traffic_tables import traffic_of, traffic_of_phase

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

    What depends on degrees comes for each of the run's, or for those of `phase`. With `dry` memory
    includes activations: those of `phase`, by default of the one with the largest microbatches at
    these degrees. With `parameters` the optimizer's table of all parameters is among the tables.
    Raises ConfigError if the config does not fit the processes, or trains with another
    engine than the native one.
    """
    if config.engine != "native":
        raise ConfigError(f"engine = {config.engine}: v4 plan supports engine = native only")
    config.check_world(world_size)
    phases, segments = config.recipe.phases, config.recipe.segments
    if phase is not None and not 0 <= phase < len(phases):
        raise ConfigError(f"phase {phase} should be one of the run's, 0 to {len(phases) - 1}")
    yield summary(config, world_size)
    if config.fit_to_memory:
        yield (
            "fit_to_memory: training chooses data.micro_batch_size, parallel.recompute and "
            "parallel.offload for its device; this plan takes them as written."
        )
    yield from recipe_part(config, world_size)
    if parameters:
        table = parameter_table(config.model)
        shapes = {name: line.shape for name, line in table.items()}
        yield render_table(table_of_run(config, shapes))
    if len(segments) > 1:
        yield degrees_table(config, world_size)
    for segment in segments:
        if phase is None or phases[phase] in segment.phases:
            if len(segments) > 1:
                yield f"\n{name_segment(segment)}"
            yield from segment_part(config.at_step(segment.first), world_size, dry, phase)


def segment_part(
    config: RunConfig, world_size: int, dry: bool, phase: int | None
) -> Iterator[Table | str]:
    """Yields what depends on the degrees of the config's segment; arguments as `describe_plan`."""
    degrees = config.degrees(world_size)
    if world_size > 1 and (phase is not None or len(config.recipe.segments) == 1):
        yield rank_table(degrees)
    if degrees.pipeline > 1:
        yield stage_table(config)
    memory = memory_by_pipeline_rank(config, degrees)
    yield from owner_tables(memory)
    if world_size > 1:
        yield traffic_of(config, degrees)
    if not dry:
        yield memory_table(config, memory)
        return
    from trainer.planning.dry_run import count_memory

    result = count_memory(config, world_size, Progress(), phase)
    yield dry_run_table(result)
    yield dry_run_summary(result)


def name_segment(segment: Segment) -> str:
    """Returns `phases 2-4, warmup 64K to sparse 64K`."""
    numbers = span(phase.number for phase in segment.phases)
    names = dict.fromkeys((segment.phases[0].name, segment.phases[-1].name))
    return f"phase{'s' * (len(segment.phases) > 1)} {numbers}, {' to '.join(names)}"


def degrees_table(config: RunConfig, world_size: int) -> Table:
    """Returns the degrees of every phase, with memory and traffic at these."""
    table = Table(title="degrees of the phases", title_justify="left")
    table.add_column("phase", justify="right")
    table.add_column("name")
    for axes in (DENSE_AXES, EXPERT_AXES):
        table.add_column(" x ".join(axes), justify="right")
    table.add_column("recomputed")
    for name in ("microbatches", "memory without activations", "sent per step"):
        table.add_column(name, justify="right")
    for phase in config.recipe.phases:
        at, rows = config.at_step(phase.first), phase.rows
        degrees = at.degrees(world_size)
        rows_of_rank = math.ceil(rows.global_batch_size / degrees.data)
        sent = traffic_of_phase(at, degrees, phase)
        table.add_row(
            str(phase.number),
            phase.name,
            *(" x ".join(map(str, degrees.of(axes))) for axes in (DENSE_AXES, EXPERT_AXES)),
            ", ".join(phase.parallel.recompute),
            f"{math.ceil(rows_of_rank / rows.micro_batch_size):,}",
            gib(sum(memory_parts(at, degrees).values())),
            "?" if isinstance(sent, str) else gib(sum(sent[1].values())),
        )
    return table


def summary(config: RunConfig, world_size: int) -> Table:
    """Returns steps, tokens, parameters, and the degrees of all axes where no phase has its own."""
    counts = parameter_counts(config.model)
    phases = config.recipe.phases
    step_tokens = max(s.rows.global_batch_size * s.rows.seq_len for s in phases)
    table = Table(title=f"{config.run_dir}", show_header=False, title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    at_degrees: list[tuple[str, str]] = []
    if len(config.recipe.segments) == 1:
        degrees, rows = config.degrees(world_size), config.segment.largest.rows
        at_degrees = [
            (" x ".join(axes), " x ".join(map(str, degrees.of(axes))))
            for axes in (DENSE_AXES, EXPERT_AXES)
        ]
        rows_of_rank = math.ceil(rows.global_batch_size / degrees.data)
        microbatches = math.ceil(rows_of_rank / rows.micro_batch_size)
        at_degrees.append(("microbatches per step on a process", f"{microbatches:,}"))
    for name, value in (
        ("processes", f"{world_size:,}"),
        *at_degrees[:2],
        ("steps", f"{config.recipe.steps:,}"),
        ("tokens per step, max", f"{step_tokens:,}"),
        ("tokens in total, max", f"{sum(phase.tokens for phase in phases):,}"),
        *at_degrees[2:],
        ("parameters", f"{counts.total:,}"),
        ("  active per token, without MTP", f"{counts.active:,}"),
        ("  in the MTP block", f"{counts.mtp:,}"),
    ):
        table.add_row(name, value)
    return table


def recipe_part(config: RunConfig, world_size: int) -> Iterator[Table | str]:
    """Yields the run's phases with steps, tokens and times, and the basis of the times."""
    recipe = config.recipe
    speed, basis = expected_flops_per_second(config, world_size)
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


def expected_flops_per_second(config: RunConfig, world_size: int) -> tuple[float | None, str]:
    """Returns FLOP/s of all processes together, and a sentence about the source of that number."""
    path = config.run_dir / "metrics.jsonl"
    records = read_metrics(path)[-100:] if path.is_file() else []
    speeds = sorted(x for r in records if (x := r.get("tflops_per_second")) is not None)
    if speeds:
        speed = speeds[len(speeds) // 2]
        return speed * 1e12, f"Times at {speed:.3g} TFLOP/s, the median of the run's last steps."
    if (peak := config.metrics.peak_tflops) is not None:
        rate = UTILISATION * peak * world_size
        return rate * 1e12, (
            f"Times at {UTILISATION:.0%} of metrics.peak_tflops = {peak:g} on "
            f"{world_size:,} processes; the run has no measured steps yet."
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
    length = config.segment.seq_len
    stages = config.segment.parallel.stages(config.model, length)
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
