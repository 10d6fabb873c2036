"""Checks across the sections of a run's config. Imports no torch.

Each yields one sentence per problem, which names both fields and what would be right.
"""

from collections.abc import Iterator

from data.config import DataPhase
from optim.config import ScheduleConfig
from trainer.config.deepspeed import deepspeed_problems
from trainer.config.operation import profile_problems
from trainer.config.phases import PhaseConfig
from trainer.config.quantisation import (
    fp8_degree_problems,
    fp8_problems,
    mxfp4_degree_problems,
    quantisation_problems,
)
from trainer.config.recipe import Recipe, Segment
from trainer.config.settings import RunSettings


def phase_problems(config: RunSettings) -> Iterator[str]:
    """Yields what keeps a recipe from being resolved: order and options of the phases.

    - `steps` is at least 1 without `phases`.
    - `phases.seq_len` never decreases from one phase to the next.
    - `phases.attention` is sparse only after a phase with warmup.
    - `phases.decay` is true in every phase after the first one with it.
    """
    if not config.phases:
        if not config.steps:
            yield "the key 'steps' is missing, or 0; it should be at least 1"
        return
    yield from _phases_on_this_engine(config)
    longest, has_warmup, decays = 0, False, False
    for number, phase in enumerate(config.phases):
        where = f"phases.{number}"
        length = config.data.seq_len if phase.seq_len is None else phase.seq_len
        if length < longest:
            yield (
                f"{where}.seq_len = {length} is shorter than the {longest} of the phase before; "
                "rows should never become shorter"
            )
        longest = length
        if phase.attention == "sparse" and not has_warmup:
            yield (
                f"{where}.attention = sparse should come after a phase with attention = warmup, in "
                "which the indexer learns what to select"
            )
        has_warmup = has_warmup or phase.attention == "warmup"
        if decays and not phase.decay:
            yield (
                f"{where}.decay = false should be true, as in the phase before: the decay lasts to "
                "the end of the run"
            )
        decays = phase.decay
        yield from _source_weights(config, where, phase)
    if decays:
        yield from _one_decay(config.optim.schedule)


def _phases_on_this_engine(config: RunSettings) -> Iterator[str]:
    """Yields phases that the engine or the model does not have.

    - `phases` need `engine` = native.
    - `phases.attention` is warmup only if `model.layer_types` has csa.
    """
    if config.engine != "native":
        yield f"phases are not supported with engine = {config.engine}; use engine = native"
    modes = [phase.attention for phase in config.phases]
    if "warmup" in modes and "csa" not in config.model.layer_types:
        yield (
            f"phases.{modes.index('warmup')}.attention = warmup trains indexers, and "
            "model.layer_types has no csa layer with one; use dense"
        )


def _source_weights(config: RunSettings, where: str, phase: PhaseConfig) -> Iterator[str]:
    """Yields what is wrong with the weights of a phase.

    - `phases.source_weights` name sources, are at least 0 and do not sum to 0.
    """
    try:
        config.data.check_weights(phase.source_weights or {})
    except ValueError as error:
        yield f"{where}: {error}"


def _one_decay(schedule: ScheduleConfig) -> Iterator[str]:
    """Yields a second definition of the decay.

    - `optim.schedule.decay_start` and `optim.schedule.decay_fraction` are null if `phases.decay` is
      true in a phase.
    """
    for field in ("decay_start", "decay_fraction"):
        if (value := getattr(schedule, field)) is not None:
            yield (
                f"optim.schedule.{field} = {value} and a phase with decay = true both define where "
                f"the decay starts; set optim.schedule.{field} to null"
            )


def run_problems(config: RunSettings, recipe: Recipe) -> Iterator[str]:
    """Yields contradictions between the sections of a config, or with its recipe.

    - `steps` is 0, or the number of steps of the `phases`, if there are phases.
    - `model.vocab_size` is at least `data.tokenizer.vocab_size`.
    """
    if config.phases and config.steps not in (0, recipe.steps):
        yield (
            f"steps = {config.steps:,}, but the phases have {recipe.steps:,}: they should cover "
            "the run and no more; omit steps, or set steps=0"
        )
    vocab_size, tokenizer_size = config.model.vocab_size, config.data.tokenizer.vocab_size
    if tokenizer_size > vocab_size:
        yield (
            f"model.vocab_size = {vocab_size} should be at least data.tokenizer.vocab_size = "
            f"{tokenizer_size}"
        )
    yield from prompt_problems(config, recipe)
    yield from task_problems(config)
    yield from save_problems(config)
    yield from quantisation_problems(config)
    yield from fp8_problems(config)
    yield from deepspeed_problems(config)  # its block matters only if the engine can do the rest
    yield from stability_problems(config, recipe)
    yield from post_problems(config, recipe)
    yield from profile_problems(config.profile, recipe.steps)
    for where, rows in rows_of(config, recipe):
        yield from _row_problems(config, where, rows)
    for segment in recipe.segments:
        for problem in _segment_problems(config, segment):
            yield name_phase(config, segment, problem)


def _segment_problems(config: RunSettings, segment: Segment) -> Iterator[str]:
    """Yields what does not fit the degrees of a segment: the model, or rows that it reads."""
    parallel = segment.parallel
    yield from parallel.problems(config.model)
    yield from fp8_degree_problems(config, parallel)
    yield from mxfp4_degree_problems(config, segment)
    for where, rows in rows_of(config, segment):
        yield from parallel.row_problems(rows.seq_len, where)


def name_phase(config: RunSettings, segment: Segment, problem: str) -> str:
    """Returns the sentence about degrees with the phase whose own they are, if they are."""
    number = segment.phases[0].number
    has_own = bool(config.phases) and config.phases[number].parallel is not None
    return f"phases.{number}.parallel: {problem}" if has_own else problem


def save_problems(config: RunSettings) -> Iterator[str]:
    """Yields what keeps checkpoints from being written beside training.

    - `checkpoint.mode` = async needs `engine` = native.
    """
    if config.checkpoint.mode == "async" and config.engine != "native":
        yield (
            f"checkpoint.mode = async is not supported with engine = {config.engine}, whose states "
            "are gathered for every checkpoint; use auto or sync"
        )


def prompt_problems(config: RunSettings, recipe: Recipe) -> Iterator[str]:
    """Yields what keeps `evaluation.prompts` from being continued.

    - `evaluation.prompts` need `engine` = native.
    - `evaluation.prompts` need `parallel.pipeline` = 1.
    """
    if not config.evaluation.prompts:
        return
    if config.engine != "native":
        yield f"evaluation.prompts are not supported with engine = {config.engine}; remove them"
    stages = max(segment.parallel.pipeline for segment in recipe.segments)
    if stages > 1:
        yield (
            f"evaluation.prompts need parallel.pipeline = 1, and it is {stages}: no process has "
            "all layers"
        )


def task_problems(config: RunSettings) -> Iterator[str]:
    """Yields what keeps `evaluation.tasks` from being evaluated.

    - `evaluation.tasks` need `engine` = native.
    """
    if config.evaluation.tasks and config.engine != "native":
        yield f"evaluation.tasks are not supported with engine = {config.engine}; remove them"


def stability_problems(config: RunSettings, recipe: Recipe) -> Iterator[str]:
    """Yields what keeps anticipatory routing or spike detection from working in this run.

    - `stability.anticipatory_routing.lag_steps` is at most the steps of every phase.
    - `stability.spikes` needs `engine` = native.
    - `stability.spikes.min_history` is at most `stability.spikes.deviation_window`.
    """
    spikes, anticipatory = config.stability.spikes, config.stability.anticipatory_routing
    is_used = anticipatory.when == "always"
    is_used |= anticipatory.when == "after_spikes" and spikes is not None
    for phase in recipe.phases:
        if is_used and config.phases and anticipatory.lag_steps > phase.steps:
            yield (
                f"stability.anticipatory_routing.lag_steps = {anticipatory.lag_steps} should be at "
                f"most {phase.steps}, the steps of phases.{phase.number}"
            )
    if spikes is None:
        return
    if config.engine == "deepspeed":
        yield (
            "stability.spikes is not supported with engine = deepspeed; use null or engine = native"
        )
    if spikes.min_history > spikes.deviation_window:
        yield (
            f"stability.spikes.min_history = {spikes.min_history} should be at most "
            f"stability.spikes.deviation_window = {spikes.deviation_window}"
        )


def post_problems(config: RunSettings, recipe: Recipe) -> Iterator[str]:
    """Yields what keeps a run from training on its own samples.

    - `post` needs `engine` = native, and `stability.spikes` = null.
    - `post` needs `stability.anticipatory_routing.when` other than always.
    - `start_from` needs `engine` = native.
    - `post.max_new_tokens` is less than `data.seq_len` and `phases.seq_len`.
    """
    if config.start_from is not None and config.engine != "native":
        yield f"start_from is not supported with engine = {config.engine}; use engine = native"
    if config.post is None:
        return
    if config.engine != "native":
        yield f"post is not supported with engine = {config.engine}; use engine = native"
    if config.stability.spikes is not None:
        yield "stability.spikes is not supported with post, whose loss is no measure; use null"
    if config.stability.anticipatory_routing.when == "always":
        yield (
            "stability.anticipatory_routing.when = always needs the batches of later steps, and "
            "with post these depend on the weights; use never"
        )
    length = min(phase.rows.seq_len for phase in recipe.phases)
    if config.post.max_new_tokens >= length:
        yield (
            f"post.max_new_tokens = {config.post.max_new_tokens:,} should be less than the row "
            f"length, {length:,}, in which prompt and answer have to fit"
        )


def rows_of(config: RunSettings, part: Recipe | Segment) -> list[tuple[str, DataPhase]]:
    """Returns the rows of the validation text and of every phase, by the section with their sizes.

    Without phases, both are those of `data`. `part` of the run has the phases.
    """
    of_phases = [(f"phases.{phase.number}", phase.rows) for phase in part.phases]
    return [("data", config.data.one_phase()), *(of_phases if config.phases else [])]


def _row_problems(config: RunSettings, where: str, rows: DataPhase) -> Iterator[str]:
    """Yields what does not fit the rows of the section `where` of the config.

    - `data.seq_len` and `phases.seq_len` are at most `model.max_position_embeddings`.
    - `data.global_batch_size` is a multiple of `data.micro_batch_size`.
    - `phases.global_batch_size` and `phases.initial_batch_size` are multiples of
      `phases.micro_batch_size`.
    """
    if rows.seq_len > config.model.max_position_embeddings:
        yield (
            f"{where}.seq_len = {rows.seq_len} should be at most "
            f"model.max_position_embeddings = {config.model.max_position_embeddings}"
        )
    for name in ("global_batch_size", "initial_batch_size"):
        if (getattr(rows, name) or 0) % rows.micro_batch_size:
            yield (
                f"{where}.{name} = {getattr(rows, name)} should be a multiple of "
                f"{where}.micro_batch_size = {rows.micro_batch_size}"
            )
