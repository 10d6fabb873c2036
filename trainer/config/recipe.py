"""What a run does at a step: its phases as functions of the step alone. Imports no torch.

A run without `phases` is one phase. Everything that changes during a run is asked for here, so that
it is the same after a resume, wherever that is, and at every topology.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data.config import DataPhase
from model.config import AttentionMode
from optim.config import OptimConfig
from optim.schedule import decay_start, learning_rate_at
from trainer.config.phases import WARMUP_LEARNING_RATE, PhaseConfig, Quantisation

if TYPE_CHECKING:
    from trainer.config.run import RunConfig


@dataclass(frozen=True)
class Phase:
    """A phase of a run.

    Attributes:
        number: from 0.
        first, steps: its first step and how many it has.
        tokens: positions of all its rows.
        rows: lengths and numbers of its rows.
        attention: `select` in a run without phases, which trains no indexer.
        decay: whether the learning rate decays in it.
        learning_rate: instead of the schedule's, or None.
        mtp_loss_weight: or None for the run's.
    """

    number: int
    name: str
    first: int
    steps: int
    tokens: int
    rows: DataPhase
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
    """The phases of a run, and what they ask for at every step.

    Raises ValueError, one sentence, where they overlap, or do not cover the run's `steps`.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.phases = _resolve(config) if config.phases else (_only(config),)
        self.steps = self.phases[-1].end
        self._ends = [phase.end for phase in self.phases]
        self.optim = config.optim
        if config.phases and any(phase.decay for phase in self.phases):
            start = next(phase.first for phase in self.phases if phase.decay)
            self.optim = _decaying(config.optim, start)

    def at(self, step: int) -> Phase:
        """The phase of a step, counted from 0; the last one beyond the run."""
        return self.phases[min(bisect_right(self._ends, step), len(self.phases) - 1)]

    def in_decay(self, step: int) -> bool:
        """Whether a step lies in the learning rate's decay."""
        return step >= decay_start(self.optim, self.steps)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        own = self.at(step).learning_rate
        return learning_rate_at(self.optim, step, self.steps) if own is None else own

    def mtp_loss_weight(self, step: int) -> float:
        """The weight of the MTP loss; it falls when the learning rate starts to (REP 4.2)."""
        own, run = self.at(step).mtp_loss_weight, self.config.model.mtp_loss_weight
        later = self.config.mtp_loss_weight_in_decay
        if own is not None:
            return own
        return min(later, run) if later is not None and self.in_decay(step) else run

    @property
    def seq_len(self) -> int:
        """Of the phase with most tokens: what layers are divided over a pipeline for."""
        return max(self.phases, key=lambda phase: phase.tokens).rows.seq_len

    @property
    def largest(self) -> Phase:
        """The phase whose microbatches take most memory."""
        order = ("dense", "select", "warmup", "sparse")

        def size(phase: Phase) -> tuple[int, int, bool, int]:
            rows = phase.rows
            tokens = rows.micro_batch_size * rows.seq_len
            return tokens, rows.seq_len, phase.quantised, order.index(phase.attention)

        return max(self.phases, key=size)

    def notes(self) -> list[str]:
        """What is allowed and perhaps not meant, a sentence each."""
        model = self.config.model
        for phase in self.phases:
            entries = phase.rows.seq_len // model.csa_compress_ratio
            chooses = phase.attention == "sparse" and "csa" in model.layer_types
            if chooses and entries <= model.index_topk:
                return [
                    f"phase {phase.number} ({phase.name}): rows of {phase.rows.seq_len:,} have "
                    f"{entries:,} entries and model.index_topk is {model.index_topk:,}, so that "
                    "sparse attention sees all of them"
                ]
        return []


def _only(config: RunConfig) -> Phase:
    rows = config.data.one_phase()
    return Phase(
        number=0,
        name="",
        first=0,
        steps=config.steps,
        tokens=rows.rows_before(config.steps) * rows.seq_len,
        rows=rows,
        attention="select",
        decay=False,
        learning_rate=None,
        mtp_loss_weight=None,
        router_bias_speed=config.router_bias_speed,
        quantisation=config.quantisation,
    )


def _resolve(config: RunConfig) -> tuple[Phase, ...]:
    phases: list[Phase] = []
    step = tokens = 0
    for number, given in enumerate(config.phases):
        if given.until_tokens <= tokens:
            raise ValueError(
                f"phases.{number}.until_tokens = {given.until_tokens:,} overlaps "
                f"what comes before, which takes {tokens:,} tokens; every phase should end later "
                "than the one before"
            )
        rows = _rows(config, number, given, given.until_tokens - tokens)
        assert rows.steps is not None
        taken = rows.rows_before(rows.steps) * rows.seq_len
        warmup = given.attention == "warmup"
        speed = config.router_bias_speed
        if given.router_bias_speed is not None:
            speed = given.router_bias_speed
        phases.append(
            Phase(
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
    return tuple(phases)


def _name(given: PhaseConfig, rows: DataPhase) -> str:
    more = ", decay" * given.decay + (f", {given.quantisation}" if given.quantisation else "")
    return f"{given.attention} {short_length(rows.seq_len)}{more}"


def _rows(config: RunConfig, number: int, given: PhaseConfig, budget: int) -> DataPhase:
    """A phase's rows, and the fewest steps that take `budget` positions."""

    def of(name: str) -> int:
        own = getattr(given, name)
        return getattr(config.data, name) if own is None else own

    length, most = of("seq_len"), of("global_batch_size")
    sizes = {
        "seq_len": length,
        "global_batch_size": most,
        "micro_batch_size": of("micro_batch_size"),
    }
    weights = config.data.source_weights if given.source_weights is None else given.source_weights
    rows = DataPhase(**sizes, source_weights=weights)
    if given.initial_batch_size is not None and given.rampup_tokens is not None:
        if given.initial_batch_size >= most:
            raise ValueError(
                f"phases.{number}.initial_batch_size = {given.initial_batch_size} should be less "
                f"than the rows that it grows to, {most}"
            )
        mean = (given.initial_batch_size + most) / 2
        ramp = max(1, round(given.rampup_tokens / (mean * length)))
        rows = DataPhase(
            **sizes,
            source_weights=weights,
            initial_batch_size=given.initial_batch_size,
            rampup_steps=ramp,
        )
    low, high = 0, rows.rampup_steps + -(-budget // (length * most))
    while high - low > 1:
        middle = (low + high) // 2
        enough = rows.rows_before(middle) * length >= budget
        low, high = (low, middle) if enough else (middle, high)
    if high < rows.rampup_steps:
        raise ValueError(
            f"phases.{number}.rampup_tokens = {given.rampup_tokens:,} are more than the phase's "
            f"{budget:,} tokens"
        )
    return rows.model_copy(update={"steps": high})


def _decaying(optim: OptimConfig, start: int) -> OptimConfig:
    """The settings with the decay at a step. Raises ValueError where that is in the warm-up."""
    shape = optim.schedule
    if start < shape.warmup_steps:
        raise ValueError(
            f"optim.schedule.warmup_steps = {shape.warmup_steps} reaches into the first phase with "
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
