"""The phases of a run, and its settings as functions of the step alone. Imports no torch.

A run without `phases` is one phase. Everything that changes during a run comes from here, so that
it is the same after any resume and at every topology.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from data.config import DataPhase
from model.config import AttentionMode
from optim.config import OptimConfig
from optim.schedule import decay_start, learning_rate_at
from trainer.config.parallel import ParallelConfig
from trainer.config.phases import WARMUP_LEARNING_RATE, PhaseConfig, Quantisation
from trainer.config.settings import RecipeSettings


@dataclass(frozen=True)
class Phase:
    """A phase of a run.

    Attributes:
        number: from 0.
        name: empty in a run without phases.
        first, steps: its first step, and their number.
        tokens: positions of all its rows.
        rows: lengths and numbers of its rows.
        attention: `select` in a run without phases, which trains no indexer.
        decay: as in the phase's config; False in a run without phases, whose schedule decides.
        learning_rate: used instead of the schedule's unless None.
        mtp_loss_weight: used instead of the run's unless None.
        parallel: its degrees, those of the run where it has none of its own.
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
    parallel: ParallelConfig

    @property
    def end(self) -> int:
        """The first step after the phase."""
        return self.first + self.steps

    @property
    def quantised(self) -> bool:
        """Whether it is quantisation-aware."""
        return self.quantisation != "none"


@dataclass(frozen=True)
class Segment:
    """Phases in a row with the same `parallel`, which the same processes train."""

    number: int
    phases: tuple[Phase, ...]

    @property
    def parallel(self) -> ParallelConfig:
        """The degrees of all its phases."""
        return self.phases[0].parallel

    @property
    def first(self) -> int:
        """Its first step."""
        return self.phases[0].first

    @property
    def end(self) -> int:
        """The first step after it."""
        return self.phases[-1].end

    @property
    def seq_len(self) -> int:
        """Row length of the phase with most tokens, for which pipeline stages are balanced."""
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


class Recipe:
    """The phases of a run, and its settings at every step.

    `phases` has at least one phase, `segments` divides them by degrees, `steps` is the number of
    steps of the whole run, and `optim` has the schedule with its decay resolved. Raises ValueError,
    one sentence, where phases overlap, a ramp does not fit its phase, or the decay begins in the
    warm-up.
    """

    def __init__(self, config: RecipeSettings) -> None:
        self.phases = _resolve(config) if config.phases else (_single_phase(config),)
        by_degrees = groupby(self.phases, key=lambda phase: phase.parallel)
        self.segments = [Segment(n, tuple(some)) for n, (_, some) in enumerate(by_degrees)]
        self.steps = self.phases[-1].end
        self.optim = config.optim
        if config.phases and any(phase.decay for phase in self.phases):
            start = next(phase.first for phase in self.phases if phase.decay)
            self.optim = _decaying(config.optim, start)
        self._ends = [phase.end for phase in self.phases]
        self._model, self._data = config.model, config.data
        self._mtp_loss_weight_in_decay = config.mtp_loss_weight_in_decay
        self._post = config.post

    def at(self, step: int) -> Phase:
        """Returns the phase of a step, counted from 0; after the run, the last one."""
        return self.phases[min(bisect_right(self._ends, step), len(self.phases) - 1)]

    def in_decay(self, step: int) -> bool:
        """Returns whether a step lies in the learning rate's decay."""
        return step >= decay_start(self.optim, self.steps)

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step."""
        of_phase = self.at(step).learning_rate
        if of_phase is not None:
            return of_phase
        return learning_rate_at(self.optim, step, self.steps)

    def mtp_loss_weight(self, step: int) -> float:
        """Returns the weight of the MTP loss, lower in the learning rate's decay (report §4.2)."""
        if self._post is not None:
            return self._post.mtp_loss_weight
        of_phase, of_run = self.at(step).mtp_loss_weight, self._model.mtp_loss_weight
        in_decay = self._mtp_loss_weight_in_decay
        if of_phase is not None:
            return of_phase
        return min(in_decay, of_run) if in_decay is not None and self.in_decay(step) else of_run

    def segment_at(self, step: int) -> Segment:
        """Returns the segment of a step, counted from 0; after the run, the last one."""
        phase = self.at(step)
        return next(segment for segment in self.segments if phase in segment.phases)

    def warnings(self) -> list[str]:
        """Returns what is allowed and rarely meant.

        Sources that the weights of a phase do not name; sparse attention that selects every entry.
        """
        return [*self._unread_sources(), *self._full_selection()]

    def _unread_sources(self) -> Iterator[str]:
        data = self._data
        by_weights: dict[str, Mapping[str, float]] = {}
        for phase in self.phases:
            weights = phase.rows.source_weights
            if weights is None or weights == data.source_weights:
                by_weights["data.source_weights"] = data.source_weights
            else:
                by_weights[f"phases.{phase.number}.source_weights"] = weights
        for key in by_weights:
            if names := data.without_weight(by_weights[key]):
                yield (
                    f"{key} does not name {', '.join(names)}: nothing of it is read; a "
                    "weight of 0 silences this line"
                )

    def _full_selection(self) -> list[str]:
        model = self._model
        for phase in self.phases:
            entries = phase.rows.seq_len // model.csa_compress_ratio
            selects = phase.attention == "sparse" and "csa" in model.layer_types
            if selects and entries <= model.index_topk:
                return [
                    f"phase {phase.number} ({phase.name}): rows of {phase.rows.seq_len:,} have "
                    f"{entries:,} entries and model.index_topk is {model.index_topk:,}, so that "
                    "sparse attention selects all of them"
                ]
        return []


def _single_phase(config: RecipeSettings) -> Phase:
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
        parallel=config.parallel,
    )


def _resolve(config: RecipeSettings) -> tuple[Phase, ...]:
    """Returns the phases with their steps.

    Raises ValueError unless:

    - `phases.until_tokens` is more than the tokens of all phases before, the last step of each
      included.
    """
    phases: list[Phase] = []
    step = tokens = 0
    for number, settings in enumerate(config.phases):
        if settings.until_tokens <= tokens:
            raise ValueError(
                f"phases.{number}.until_tokens = {settings.until_tokens:,} overlaps "
                f"what comes before, which takes {tokens:,} tokens; every phase should end later "
                "than the one before"
            )
        phase = _phase(config, number, first=step, budget=settings.until_tokens - tokens)
        phases.append(phase)
        step, tokens = phase.end, tokens + phase.tokens
    return tuple(phases)


def _phase(config: RecipeSettings, number: int, first: int, budget: int) -> Phase:
    """Returns a phase that begins at the step `first` and takes `budget` tokens."""
    settings = config.phases[number]
    rows = _rows(config, number, budget)
    steps = _steps(rows, number, settings, budget)
    is_warmup = settings.attention == "warmup"
    learning_rate, speed = settings.learning_rate, settings.router_bias_speed
    own = settings.parallel
    if is_warmup:
        learning_rate = WARMUP_LEARNING_RATE if learning_rate is None else learning_rate
        speed = 0.0
    return Phase(
        number=number,
        name=settings.name or _name(settings, rows),
        first=first,
        steps=steps,
        tokens=rows.rows_before(steps) * rows.seq_len,
        rows=rows.model_copy(update={"steps": steps}),
        attention=settings.attention,
        decay=settings.decay,
        learning_rate=learning_rate,
        mtp_loss_weight=settings.mtp_loss_weight,
        router_bias_speed=config.router_bias_speed if speed is None else speed,
        quantisation=settings.quantisation or config.quantisation,
        parallel=config.parallel if own is None else own.applied_to(config.parallel),
    )


def _rows(config: RecipeSettings, number: int, budget: int) -> DataPhase:
    """Returns the rows of a phase, with the settings of `data` where the phase has none.

    The number of steps is not set yet.

    Raises ValueError unless:

    - `phases.initial_batch_size` is less than `phases.global_batch_size`.
    """
    settings = config.phases[number]
    fields: dict[str, Any] = {}
    for name in ("seq_len", "global_batch_size", "micro_batch_size", "source_weights"):
        of_phase = getattr(settings, name)
        fields[name] = getattr(config.data, name) if of_phase is None else of_phase
    first, final = settings.initial_batch_size, fields["global_batch_size"]
    if first is None or settings.rampup_tokens is None:
        return DataPhase(**fields)
    if first >= final:
        raise ValueError(
            f"phases.{number}.initial_batch_size = {first} should be less than the rows that it "
            f"grows to, {final}"
        )
    mean = (first + final) / 2
    rampup_steps = max(1, round(settings.rampup_tokens / (mean * fields["seq_len"])))
    return DataPhase(**fields, initial_batch_size=first, rampup_steps=rampup_steps)


def _steps(rows: DataPhase, number: int, settings: PhaseConfig, budget: int) -> int:
    """Returns the smallest number of steps that takes `budget` tokens, by bisection.

    Raises ValueError unless:

    - `phases.rampup_tokens` is at most the tokens of the phase.
    """
    low, high = 0, rows.rampup_steps + -(-budget // (rows.seq_len * rows.global_batch_size))
    while high - low > 1:
        middle = (low + high) // 2
        enough = rows.rows_before(middle) * rows.seq_len >= budget
        low, high = (low, middle) if enough else (middle, high)
    if high < rows.rampup_steps:
        raise ValueError(
            f"phases.{number}.rampup_tokens = {settings.rampup_tokens:,} are more than the phase's "
            f"{budget:,} tokens"
        )
    return high


def _name(settings: PhaseConfig, rows: DataPhase) -> str:
    suffix = ", decay" if settings.decay else ""
    suffix += f", {settings.quantisation}" if settings.quantisation else ""
    return f"{settings.attention} {short_length(rows.seq_len)}{suffix}"


def _decaying(optim: OptimConfig, start: int) -> OptimConfig:
    """Returns the settings with the decay from a step on.

    Raises ValueError unless:

    - `optim.schedule.warmup_steps` end before the first phase with `phases.decay`.
    """
    schedule = optim.schedule
    if start < schedule.warmup_steps:
        raise ValueError(
            f"optim.schedule.warmup_steps = {schedule.warmup_steps} reaches into the first phase "
            f"with decay = true, which begins at step {start}"
        )
    decaying = schedule.model_copy(update={"decay_start": start, "decay_fraction": None})
    return optim.model_copy(update={"schedule": decaying})


def short_length(tokens: int) -> str:
    """Returns 4K for 4096 and 1M for 1048576; other numbers as they are."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{letter}"
    return str(tokens)
