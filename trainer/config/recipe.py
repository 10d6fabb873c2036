"""What a run does at a step: its stages as functions of the step alone. Imports no torch.

A run without `stages` is one stage. Everything that changes during a run is asked for here, so that
it is the same after a resume, wherever that is, and at every topology.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data.config import DataStage
from model.config import AttentionMode
from optim.config import OptimConfig
from optim.schedule import decay_start, schedule
from trainer.config.stages import WARMUP_LEARNING_RATE, Quantisation, StageConfig

if TYPE_CHECKING:
    from trainer.config.run import RunConfig


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Attributes:
        number: from 0.
        first, steps: its first step and how many it has.
        tokens: positions of all its rows.
        rows: lengths and numbers of its rows.
        attention: `select` in a run without stages, which trains no indexer.
        decay: whether the learning rate decays in it.
        learning_rate: instead of the schedule's, or None.
        mtp_loss_weight: or None for the run's.
    """

    number: int
    name: str
    first: int
    steps: int
    tokens: int
    rows: DataStage
    attention: AttentionMode
    decay: bool
    learning_rate: float | None
    mtp_loss_weight: float | None
    router_bias_speed: float
    quantisation: Quantisation

    @property
    def end(self) -> int:
        """The first step that is no longer its own."""
        return self.first + self.steps

    @property
    def quantised(self) -> bool:
        """Whether it is quantisation-aware."""
        return self.quantisation != "none"


class Recipe:
    """The stages of a run, and what they ask for at every step.

    Raises ValueError, one sentence, where they overlap, or do not cover the run's `steps`.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.stages = _resolve(config) if config.stages else (_only(config),)
        self.steps = self.stages[-1].end
        self._ends = [stage.end for stage in self.stages]
        self.optim = config.optim
        if config.stages and any(stage.decay for stage in self.stages):
            start = next(stage.first for stage in self.stages if stage.decay)
            self.optim = _decaying(config.optim, start)

    def at(self, step: int) -> Stage:
        """The stage of a step, counted from 0; the last one beyond the run."""
        return self.stages[min(bisect_right(self._ends, step), len(self.stages) - 1)]

    def in_decay(self, step: int) -> bool:
        """Whether a step lies in the learning rate's decay."""
        return step >= decay_start(self.optim, self.steps)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        own = self.at(step).learning_rate
        return schedule(self.optim, step, self.steps) if own is None else own

    def mtp_loss_weight(self, step: int) -> float:
        """The weight of the MTP loss; it falls when the learning rate starts to (REP 4.2)."""
        own, run = self.at(step).mtp_loss_weight, self.config.model.mtp_loss_weight
        later = self.config.mtp_loss_weight_in_decay
        if own is not None:
            return own
        return min(later, run) if later is not None and self.in_decay(step) else run

    @property
    def row_length(self) -> int:
        """Of the stage with most tokens: what layers are divided over a pipeline for."""
        return max(self.stages, key=lambda stage: stage.tokens).rows.row_length

    @property
    def largest(self) -> Stage:
        """The stage whose microbatches take most memory."""
        order = ("dense", "select", "warmup", "sparse")

        def size(stage: Stage) -> tuple[int, int, bool, int]:
            rows = stage.rows
            tokens = rows.micro_rows * rows.row_length
            return tokens, rows.row_length, stage.quantised, order.index(stage.attention)

        return max(self.stages, key=size)

    def notes(self) -> list[str]:
        """What is allowed and perhaps not meant, a sentence each."""
        model = self.config.model
        for stage in self.stages:
            entries = stage.rows.row_length // model.csa_compress_ratio
            chooses = stage.attention == "sparse" and "csa" in model.layer_types
            if chooses and entries <= model.index_topk:
                return [
                    f"stage {stage.number} ({stage.name}): rows of {stage.rows.row_length:,} have "
                    f"{entries:,} entries and model.index_topk is {model.index_topk:,}, so that "
                    "sparse attention sees all of them"
                ]
        return []


def _only(config: RunConfig) -> Stage:
    rows = config.data.one_stage()
    return Stage(
        number=0,
        name="",
        first=0,
        steps=config.steps,
        tokens=rows.rows_before(config.steps) * rows.row_length,
        rows=rows,
        attention="select",
        decay=False,
        learning_rate=None,
        mtp_loss_weight=None,
        router_bias_speed=config.router_bias_speed,
        quantisation=config.quantisation,
    )


def _resolve(config: RunConfig) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    step = tokens = 0
    for number, given in enumerate(config.stages):
        if given.until <= tokens:
            raise ValueError(
                f"stages.{number}.until = {given.until:,} overlaps what comes before, which takes "
                f"{tokens:,} tokens; every stage should end later than the one before"
            )
        rows = _rows(config, number, given, given.until - tokens)
        assert rows.steps is not None
        taken = rows.rows_before(rows.steps) * rows.row_length
        warmup = given.attention == "warmup"
        speed = config.router_bias_speed
        if given.router_bias_speed is not None:
            speed = given.router_bias_speed
        stages.append(
            Stage(
                number=number,
                name=given.name or _name(given, rows),
                first=step,
                steps=rows.steps,
                tokens=taken,
                rows=rows,
                attention=given.attention,
                decay=given.decay,
                learning_rate=WARMUP_LEARNING_RATE
                if warmup and given.learning_rate is None
                else given.learning_rate,
                mtp_loss_weight=given.mtp_loss_weight,
                router_bias_speed=0.0 if warmup else speed,
                quantisation=given.quantisation or config.quantisation,
            )
        )
        step, tokens = step + rows.steps, tokens + taken
    return tuple(stages)


def _name(given: StageConfig, rows: DataStage) -> str:
    more = ", decay" * given.decay + (f", {given.quantisation}" if given.quantisation else "")
    return f"{given.attention} {short_length(rows.row_length)}{more}"


def _rows(config: RunConfig, number: int, given: StageConfig, budget: int) -> DataStage:
    """A stage's rows, and the fewest steps that take `budget` positions."""

    def of(name: str) -> int:
        own = getattr(given, name)
        return getattr(config.data, name) if own is None else own

    length, most = of("row_length"), of("batch_rows")
    sizes = {"row_length": length, "batch_rows": most, "micro_rows": of("micro_rows")}
    weights = config.data.weights if given.weights is None else given.weights
    rows = DataStage(**sizes, weights=weights)
    if given.ramp_from is not None and given.ramp_tokens is not None:
        if given.ramp_from >= most:
            raise ValueError(
                f"stages.{number}.ramp_from = {given.ramp_from} should be less than the rows that "
                f"it grows to, {most}"
            )
        mean = (given.ramp_from + most) / 2
        ramp = max(1, round(given.ramp_tokens / (mean * length)))
        rows = DataStage(**sizes, weights=weights, ramp_from=given.ramp_from, ramp_steps=ramp)
    low, high = 0, rows.ramp_steps + -(-budget // (length * most))
    while high - low > 1:
        middle = (low + high) // 2
        enough = rows.rows_before(middle) * length >= budget
        low, high = (low, middle) if enough else (middle, high)
    if high < rows.ramp_steps:
        raise ValueError(
            f"stages.{number}.ramp_tokens = {given.ramp_tokens:,} are more than the stage's "
            f"{budget:,} tokens"
        )
    return rows.model_copy(update={"steps": high})


def _decaying(optim: OptimConfig, start: int) -> OptimConfig:
    """The settings with the decay at a step. Raises ValueError where that is in the warm-up."""
    shape = optim.schedule
    if start < shape.warmup_steps:
        raise ValueError(
            f"optim.schedule.warmup_steps = {shape.warmup_steps} reaches into the first stage with "
            f"decay = true, which begins at step {start}"
        )
    decaying = shape.model_copy(update={"decay_start": start, "decay_fraction": None})
    return optim.model_copy(update={"schedule": decaying})


def short_length(tokens: int) -> str:
    """4096 as 4K, 1048576 as 1M; other numbers as they are."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{letter}"
    return str(tokens)
