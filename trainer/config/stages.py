"""The stages of a run, by tokens, as a config says them. Imports no torch.

    stages:
      - {until: 1e12, attention: dense, row_length: 4096, ramp_from: 2304, ramp_tokens: 1e11}
      - {until: 1.01e12, attention: warmup, row_length: 65536, batch_rows: 1152}
      - {until: 32e12, attention: sparse, row_length: 65536, batch_rows: 1152, decay: true}

What a stage leaves out is the run's: `data.row_length`, `data.batch_rows`, `data.micro_rows`,
`data.weights`, `model.mtp_loss_weight` and `mtp_loss_weight_in_decay`, `router_bias_speed`,
`quantisation`, and `optim.learning_rate` with `optim.schedule`. trainer/config/recipe.py makes functions
of the step of it.
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


class StageConfig(BaseModel):
    """A stage of a run.

    Tokens are positions of rows, of which packing leaves about one in two thousand empty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    until: Tokens
    """Tokens of the whole run at which the stage ends; its last step may go beyond."""
    attention: Literal["dense", "warmup", "sparse"]
    """`dense`: CSA layers attend to every entry, and their indexers rest. `warmup`: likewise, and
    nothing but the indexers is trained. `sparse`: to the indexers' choice; everything trains."""
    name: str | None = None
    """For people; attention and row length where it is absent."""
    row_length: Annotated[int, Field(ge=2)] | None = None
    batch_rows: Rows | None = None
    micro_rows: Rows | None = None
    ramp_from: Rows | None = None
    """Rows of the stage's first step, from which they grow to `batch_rows`..."""
    ramp_tokens: Tokens | None = None
    """...over about this many tokens."""
    weights: dict[str, float] | None = None
    """The sources' shares of the tokens."""
    decay: bool = False
    """The learning rate's cosine begins with the first such stage and ends with the run."""
    learning_rate: Rate | None = None
    """Instead of the schedule's, all through the stage; 1e-3 where absent in a `warmup`."""
    mtp_loss_weight: Rate | None = None
    router_bias_speed: Rate | None = None
    quantisation: Quantisation | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "StageConfig":
        if (self.ramp_from is None) != (self.ramp_tokens is None):
            raise ValueError("a ramp needs both `ramp_from` and `ramp_tokens`, or neither")
        if self.attention == "warmup":
            for field in ("mtp_loss_weight", "router_bias_speed"):
                if getattr(self, field) is not None:
                    raise ValueError(
                        f"{field} does nothing where attention = warmup trains the indexers alone; "
                        "leave it out"
                    )
        return self


def problems(config: Any) -> Iterator[str]:
    """What the stages of a run's config have wrong, a sentence each; none where there are none."""
    stages: tuple[StageConfig, ...] = config.stages
    if not stages:
        return
    yield from _engine_and_model(config, stages)
    longest, warmed, decays = 0, False, False
    for number, stage in enumerate(stages):
        here = f"stages.{number}"
        length = config.data.row_length if stage.row_length is None else stage.row_length
        if length < longest:
            yield (
                f"{here}.row_length = {length} is shorter than the {longest} of the stage before; "
                "rows should never become shorter"
            )
        longest = length
        if stage.attention == "sparse" and not warmed:
            yield (
                f"{here}.attention = sparse should come after a stage with attention = warmup, in "
                "which the indexer learns what to choose"
            )
        warmed = warmed or stage.attention == "warmup"
        if decays and not stage.decay:
            yield f"{here}.decay = false should be true, as in the stage before: the run ends there"
        decays = stage.decay
        if stage.weights is not None:
            yield from _weights(config, here, stage.weights)
    if decays:
        yield from _one_decay(config.optim.schedule)


def _engine_and_model(config: Any, stages: tuple[StageConfig, ...]) -> Iterator[str]:
    if config.engine != "native":
        yield f"stages do not go with engine = {config.engine}; use engine = native"
    modes = [stage.attention for stage in stages]
    if "warmup" in modes and "csa" not in config.model.layer_types:
        yield (
            f"stages.{modes.index('warmup')}.attention = warmup trains indexers, and "
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
                f"optim.schedule.{field} = {value} and a stage with decay = true both say where "
                f"the decay starts; set optim.schedule.{field} to null"
            )
