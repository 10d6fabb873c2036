"""The phases of a run, by tokens, as a config says them. Imports no torch.

    phases:
      - {until_tokens: 1e12, attention: dense, seq_len: 4096,
         initial_batch_size: 2304, rampup_tokens: 1e11}
      - {until_tokens: 1.01e12, attention: warmup, seq_len: 65536, global_batch_size: 1152}
      - {until_tokens: 32e12, attention: sparse, seq_len: 65536,
         global_batch_size: 1152, decay: true}

What a phase leaves out is the run's: `data.seq_len`, `data.global_batch_size`,
`data.micro_batch_size`, `data.source_weights`, `model.mtp_loss_weight` and
`mtp_loss_weight_in_decay`, `router_bias_speed`, `quantisation`, and `optim.learning_rate` with
`optim.schedule`. trainer/config/recipe.py makes functions of the step of it.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _whole(value: Any) -> Any:
    """1e12 as YAML reads it, where a whole number is wanted."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Tokens = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Rows = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0)]
Quantisation = Literal["none", "mxfp4"]

WARMUP_LEARNING_RATE = 1e-3
"""Of the indexer's warm-up (V3.2)."""


class PhaseConfig(BaseModel):
    """A phase of a run.

    Tokens are positions of rows, of which packing leaves about one in two thousand empty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    until_tokens: Tokens
    """Tokens of the whole run at which the phase ends; its last step may go beyond."""
    attention: Literal["dense", "warmup", "sparse"]
    """`dense`: CSA layers attend to every entry, and their indexers rest. `warmup`: likewise, and
    nothing but the indexers is trained. `sparse`: to the indexers' choice; everything trains."""
    name: str | None = None
    """For people; attention and row length where it is absent."""
    seq_len: Annotated[int, Field(ge=2)] | None = None
    global_batch_size: Rows | None = None
    micro_batch_size: Rows | None = None
    initial_batch_size: Rows | None = None
    """Rows of the phase's first step, from which they grow to `global_batch_size`..."""
    rampup_tokens: Tokens | None = None
    """...over about this many tokens."""
    source_weights: dict[str, float] | None = None
    """The sources' shares of the tokens."""
    decay: bool = False
    """The learning rate's cosine begins with the first such phase and ends with the run."""
    learning_rate: Rate | None = None
    """Instead of the schedule's, all through the phase; 1e-3 where absent in a `warmup`."""
    mtp_loss_weight: Rate | None = None
    router_bias_speed: Rate | None = None
    quantisation: Quantisation | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "PhaseConfig":
        if (self.initial_batch_size is None) != (self.rampup_tokens is None):
            raise ValueError(
                "a ramp needs both `initial_batch_size` and `rampup_tokens`, or neither"
            )
        if self.attention == "warmup":
            for field in ("mtp_loss_weight", "router_bias_speed"):
                if getattr(self, field) is not None:
                    raise ValueError(
                        f"{field} does nothing where attention = warmup trains the indexers alone; "
                        "leave it out"
                    )
        return self


def problems(config: Any) -> Iterator[str]:
    """What the phases of a run's config have wrong, a sentence each; none where there are none."""
    phases: tuple[PhaseConfig, ...] = config.phases
    if not phases:
        return
    yield from _engine_and_model(config, phases)
    longest, warmed, decays = 0, False, False
    for number, phase in enumerate(phases):
        here = f"phases.{number}"
        length = config.data.seq_len if phase.seq_len is None else phase.seq_len
        if length < longest:
            yield (
                f"{here}.seq_len = {length} is shorter than the {longest} of the phase before; "
                "rows should never become shorter"
            )
        longest = length
        if phase.attention == "sparse" and not warmed:
            yield (
                f"{here}.attention = sparse should come after a phase with attention = warmup, in "
                "which the indexer learns what to choose"
            )
        warmed = warmed or phase.attention == "warmup"
        if decays and not phase.decay:
            yield f"{here}.decay = false should be true, as in the phase before: the run ends there"
        decays = phase.decay
        if phase.source_weights is not None:
            yield from _weights(config, here, phase.source_weights)
    if decays:
        yield from _one_decay(config.optim.schedule)


def _engine_and_model(config: Any, phases: tuple[PhaseConfig, ...]) -> Iterator[str]:
    if config.engine != "native":
        yield f"phases do not go with engine = {config.engine}; use engine = native"
    modes = [phase.attention for phase in phases]
    if "warmup" in modes and "csa" not in config.model.layer_types:
        yield (
            f"phases.{modes.index('warmup')}.attention = warmup trains indexers, and "
            "model.layer_types has no csa layer with one; use dense"
        )


def _weights(config: Any, here: str, weights: dict[str, float]) -> Iterator[str]:
    try:
        config.data.check_weights(weights)
    except ValueError as error:
        yield f"{here}: {error}"


def _one_decay(schedule: Any) -> Iterator[str]:
    for field in ("decay_start", "decay_fraction"):
        if (value := getattr(schedule, field)) is not None:
            yield (
                f"optim.schedule.{field} = {value} and a phase with decay = true both say where "
                f"the decay starts; set optim.schedule.{field} to null"
            )
