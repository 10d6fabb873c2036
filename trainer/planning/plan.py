"""`v4 plan`: what a config asks for, before anything is run."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator

from rich.table import Table

from data.config import DataPhase
from model.flops import flops_by_part, training_flops
from model.parameters import parameter_counts
from trainer.config import ConfigError, RunConfig
from trainer.config.recipe import Phase, Recipe, short_length
from trainer.formatting import GIB, duration, gib, short
from trainer.metrics.jsonl import read_metrics
from trainer.parallel.degrees import DENSE, EXPERT, Degrees
from trainer.parallel.grid import who_is_where
from trainer.parallel.stage_plan import StagePlan
from trainer.planning.dry_run import DryRun, RankMemory, dry_run
from trainer.planning.static_memory import assignment, memory_parts, snapshot_memory

UTILISATION = 0.4
"""Share of the peak that a run is taken to reach before it has been measured."""


def plan(
    config: RunConfig, world_size: int, dry: bool = False, phase: int | None = None
) -> Iterator[Table | str]:
    """Steps, tokens, parameters, axes, who is where, stages, owners and memory in tables.

    With `dry` memory has activations: those of the run's `phase`, by default of the one with the
    largest microbatches. Raises ConfigError where the config does not fit the
    processes, or trains with another engine than the native one.
    """
    if config.engine != "native":
        raise ConfigError(f"engine = {config.engine}: v4 plan knows the memory of native only")
    degrees = config.degrees(world_size)
    yield summary(config, degrees)
    if config.fit_to_memory:
        yield (
            "fit_to_memory: training chooses data.micro_batch_size and, for less memory, parallel.recompute "
            "and parallel.offload for the device that it finds; this plan takes them as written."
        )
    yield from recipe_part(config, degrees)
    if world_size > 1:
        yield who_is_where(degrees)
    if degrees.pipeline > 1:
        yield stage_table(config)
    yield from assignment(config, degrees)
    if not dry:
        yield memory_table(config, degrees)
        return
    phases = Recipe(config).phases
    if phase is not None and not 0 <= phase < len(phases):
        raise ConfigError(f"phase {phase} should be one of the run's, 0 to {len(phases) - 1}")
    found = dry_run(config, world_size, _TimeLeft(), phase)
    yield dry_run_table(found)
    yield dry_run_words(found)


def summary(config: RunConfig, degrees: Degrees) -> Table:
    """Steps, tokens, parameters and the degrees of all axes."""
    counts = parameter_counts(config.model)
    phases = Recipe(config).phases
    step_tokens = max(s.rows.global_batch_size * s.rows.seq_len for s in phases)
    largest = Recipe(config).largest.rows
    table = Table(title=f"{config.run_dir}", show_header=False, title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    rows_of_rank = math.ceil(largest.global_batch_size / degrees.data)
    for name, value in (
        ("processes", f"{degrees.world:,}"),
        *((" x ".join(axes), " x ".join(map(str, degrees.of(axes)))) for axes in (DENSE, EXPERT)),
        ("steps", f"{config.steps:,}"),
        ("tokens a step, at most", f"{step_tokens:,}"),
        ("tokens in all, at most", f"{sum(phase.tokens for phase in phases):,}"),
        (
            "microbatches a step on a process",
            f"{math.ceil(rows_of_rank / largest.micro_batch_size):,}",
        ),
        ("parameters", f"{counts.total:,}"),
        ("  active for a token, without MTP", f"{counts.active:,}"),
        ("  in the MTP block", f"{counts.mtp:,}"),
    ):
        table.add_row(name, value)
    return table


def recipe_part(config: RunConfig, degrees: Degrees) -> Iterator[Table | str]:
    """The run's phases with their steps, tokens and times, and what the times rest on."""
    recipe = Recipe(config)
    rate, words = expected_rate(config, degrees)
    table = Table(title="the run, phase by phase", title_justify="left")
    names = ("phase", "name", "steps", "tokens", "until", "rows x length", "rate", "mtp", "time")
    for name in names:
        table.add_column(name, justify="left" if name == "name" else "right")
    until, whole = 0, 0.0
    for phase in recipe.phases:
        operations = phase_operations(config, phase)
        until, whole = until + phase.tokens, whole + operations
        table.add_row(
            f"phase {phase.number}",
            phase.name or "the whole run",
            f"{phase.steps:,}",
            short(phase.tokens),
            short(until),
            rows_in_words(phase.rows),
            rates_in_words(recipe, phase),
            f"{recipe.mtp_loss_weight(phase.end - 1):g}",
            "?" if rate is None else duration(operations / rate),
        )
    if len(recipe.phases) > 1 and rate is not None:
        table.add_section()
        table.add_row("in all", "", f"{recipe.steps:,}", *[""] * 5, duration(whole / rate))
    yield table
    yield words
    yield from recipe.notes()


def phase_operations(config: RunConfig, phase: Phase) -> float:
    """Operations of a phase, every row taken to be one sample."""
    of_row = training_flops(config.model, [phase.rows.seq_len], attention=phase.attention)
    return of_row * (phase.tokens // phase.rows.seq_len)


def expected_rate(config: RunConfig, degrees: Degrees) -> tuple[float | None, str]:
    """Operations a second of all processes, and a sentence about where that number is from."""
    path = config.run_dir / "metrics.jsonl"
    records = read_metrics(path)[-100:] if path.is_file() else []
    speeds = sorted(record["tflops_per_second"] for record in records)
    if speeds:
        speed = speeds[len(speeds) // 2]
        return speed * 1e12, f"Times at the {speed:.3g} TFLOP/s of the run's newest steps."
    if (peak := config.metrics.peak_tflops) is not None:
        rate = UTILISATION * peak * degrees.world
        return rate * 1e12, (
            f"Times at {UTILISATION:.0%} of metrics.peak_tflops = {peak:g} on {degrees.world:,} "
            "processes; no run has been measured yet."
        )
    return None, "Times need metrics.peak_tflops, or a run that has begun."


def rows_in_words(rows: DataPhase) -> str:
    """`4 to 8 x 512` where a ramp leads to eight rows."""
    ramp = "" if rows.initial_batch_size is None else f"{rows.initial_batch_size:,} to "
    return f"{ramp}{rows.global_batch_size:,} x {short_length(rows.seq_len)}"


def rates_in_words(recipe: Recipe, phase: Phase) -> str:
    """The learning rates of the first, the middle and the last step."""
    steps = (phase.first, (phase.first + phase.end) // 2, phase.end - 1)
    return ", ".join(dict.fromkeys(f"{recipe.learning_rate(step):.3g}" for step in steps))


def stage_table(config: RunConfig) -> Table:
    """Layers of each stage of the pipeline, and its share of a row's operations."""
    length = Recipe(config).seq_len
    stages = config.parallel.stages(config.model, length)
    shares = stage_shares(stages, *flops_by_part(config.model, length))
    rank_of = {number: rank for rank in range(stages.ranks) for number in stages.stages_of(rank)}
    table = Table(title="stages", title_justify="left")
    for name in ("stage", "pipeline rank", "layers", "kinds", "operations"):
        table.add_column(name, justify="left" if name == "kinds" else "right")
    for number, share in enumerate(shares):
        rows = stages.layers_of(number)
        counts = Counter(config.model.layer_types[row] for row in rows)
        kinds = [f"{count} {kind}" for kind, count in counts.items()]
        kinds += ["heads"] if stages.is_last(number) else []
        table.add_row(
            str(number), str(rank_of[number]), span(rows), ", ".join(kinds), f"{share:.2%}"
        )
    return table


def stage_shares(stages: StagePlan, costs: list[float], tail: float) -> list[float]:
    """Each stage's share of the costs of all layers and of the `tail` behind them."""
    of_stage = [
        sum(costs[row] for row in stages.layers_of(number)) + tail * stages.is_last(number)
        for number in range(len(stages.layers))
    ]
    return [cost / (sum(costs) + tail) for cost in of_stage]


def memory_table(config: RunConfig, degrees: Degrees) -> Table:
    """What the fullest process holds all the time."""
    table = Table(title="memory of the fullest process", show_header=False, title_justify="left")
    table.add_column("part")
    table.add_column("size", justify="right")
    parts = memory_parts(config, degrees)
    for name, size in parts.items():
        table.add_row(name, gib(size))
    table.add_section()
    table.add_row("in all, without activations (--dry-run adds them)", gib(sum(parts.values())))
    if held := snapshot_memory(config, degrees):
        table.add_row("on the host: snapshots of stability.spikes", gib(held))
    return table


def dry_run_table(found: DryRun) -> Table:
    """Memory by pipeline rank and part."""
    unit, name = (GIB, "GiB") if found.fullest.total >= GIB else (2**20, "MiB")
    where = f", phase {found.phase.number}, {found.phase.name}" if found.phase.name else ""
    table = Table(title=f"memory of a process, {name}{where}", title_justify="left")
    names = [*found.ranks[0].resident, "microbatches", "in flight", "activations", "workspace"]
    for name in ("ranks", "layers", "parameters", *names, "in all"):
        table.add_column(name, justify="right")
    for ranks in alike(found):
        one = max(ranks, key=lambda rank: rank.total)
        sizes = [one.microbatches, one.activations, one.workspace, one.total]
        values = [f"{size / unit:.2f}" for size in (*one.resident.values(), *sizes)]
        flight = "+".join(str(stage.in_flight) for stage in one.stages)
        values.insert(len(one.resident) + 1, flight)
        layers = " ".join(span(stage.layers) for stage in one.stages)
        numbers = [rank.rank for rank in ranks]
        table.add_row(span(numbers), layers, f"{one.parameters:,}", *values)
    return table


def dry_run_words(found: DryRun) -> str:
    """The sum of all parameters, and the fullest rank."""
    full = found.fullest
    update = ""
    if full.update > full.microbatches + full.activations + full.workspace:
        update = " during the optimizer's step"
    return (
        f"All processes together hold {found.parameters:,} parameters, each counted once. The "
        f"fullest is rank {full.rank} on pipeline rank {full.pipeline}: {gib(full.total)} at most"
        f"{update}, of which {gib(sum(full.resident.values()))} all the time."
    )


def alike(found: DryRun) -> Iterator[list[RankMemory]]:
    """The ranks that were looked at, those of a pipeline rank together that hold as much to
    0.1%."""
    for pipeline in range(found.degrees.pipeline):
        ranks = [rank for rank in found.ranks if rank.pipeline == pipeline]
        same = [rank for rank in ranks if abs(rank.total / ranks[0].total - 1) < 1e-3]
        yield same
        yield from ([rank] for rank in ranks if rank not in same)


def span(numbers: Iterable[int]) -> str:
    """`3-7` for numbers in order, from the first to the last; nothing for none."""
    numbers = list(numbers)
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    return f"{numbers[0]}-{numbers[-1]}"


class _TimeLeft:
    """A line on stderr, on a terminal one that changes: how far a dry run is."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        print("dry run: about a minute", file=sys.stderr, flush=True)

    def __call__(self, done: int, of: int) -> None:
        spent = time.monotonic() - self._start
        text = f"dry run: {done} of {of} ranks, {spent:.0f} s"
        if done < of:
            text += f", about {spent / done * (of - done):.0f} s to go"
        if sys.stderr.isatty():
            print(f"\r{text:<60}", end="\n" if done == of else "", file=sys.stderr, flush=True)
        elif done == of:
            print(text, file=sys.stderr, flush=True)
