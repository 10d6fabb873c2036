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

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt, model_validator

from trainer.config.section import Section


def _whole(value: Any) -> Any:
    """1e12 as YAML reads it, where a whole number is wanted."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Tokens = Annotated[PositiveInt, BeforeValidator(_whole)]
Quantisation = Literal["none", "mxfp4"]

WARMUP_LEARNING_RATE = 1e-3
"""Of the indexer's warm-up (V3.2)."""


class PhaseConfig(Section):
    """A phase of a run.

    Tokens are positions of rows, of which packing leaves about one in two thousand empty.
    """

    until_tokens: Tokens
    """Tokens of the whole run at which the phase ends; its last step may go beyond."""
    attention: Literal["dense", "warmup", "sparse"]
    """`dense`: CSA layers attend to every entry, and their indexers rest. `warmup`: likewise, and
    nothing but the indexers is trained. `sparse`: to the indexers' choice; everything trains."""
    name: str | None = None
    """For people; attention and row length where it is absent."""
    seq_len: Annotated[int, Field(ge=2)] | None = None
    global_batch_size: PositiveInt | None = None
    micro_batch_size: PositiveInt | None = None
    initial_batch_size: PositiveInt | None = None
    """Rows of the phase's first step, from which they grow to `global_batch_size`..."""
    rampup_tokens: Tokens | None = None
    """...over about this many tokens."""
    source_weights: dict[str, float] | None = None
    """The sources' shares of the tokens."""
    decay: bool = False
    """The learning rate's cosine begins with the first such phase and ends with the run."""
    learning_rate: NonNegativeFloat | None = None
    """Instead of the schedule's, all through the phase; 1e-3 where absent in a `warmup`."""
    mtp_loss_weight: NonNegativeFloat | None = None
    router_bias_speed: NonNegativeFloat | None = None
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
