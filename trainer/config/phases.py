"""The phases of a run, by tokens, as a config has them. Imports no torch.

    phases:
      - {until_tokens: 1e12, attention: dense, seq_len: 4096,
         initial_batch_size: 2304, rampup_tokens: 1e11}
      - {until_tokens: 1.01e12, attention: warmup, seq_len: 65536, global_batch_size: 1152}
      - {until_tokens: 32e12, attention: sparse, seq_len: 65536,
         global_batch_size: 1152, decay: true}

What a phase omits is the run's: `data.seq_len`, `data.global_batch_size`,
`data.micro_batch_size`, `data.source_weights`, `model.mtp_loss_weight` and
`mtp_loss_weight_in_decay`, `router_bias_speed`, `quantisation`, `parallel`, and
`optim.learning_rate` with `optim.schedule`. trainer/config/recipe.py resolves phases into steps.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from data.config import Rows
from model.config import LossWeight
from trainer.config.parallel import OffloadedPart, ParallelConfig, RecomputedPart
from trainer.config.section import Section
from trainer.parallel.stage_plan import ScheduleName


def _whole(value: Any) -> Any:
    """Returns 1e12, a float in YAML, as an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Tokens = Annotated[int, Field(gt=0, le=10**18), BeforeValidator(_whole)]
BiasSpeed = Annotated[float, Field(ge=0, le=100)]
Quantisation = Literal["none", "mxfp4", "mxfp4_without_kv"]

WARMUP_LEARNING_RATE = 1e-3
"""Learning rate of the indexer's warm-up (V3.2)."""


class PhaseParallelConfig(Section):
    """A phase's own degrees, on the processes of the run; what is null is the run's.

    Where two phases in a row differ, the run saves between them and its processes start again.
    """

    tensor: PositiveInt | None = None
    """Instead of parallel.tensor. [ranks]"""
    expert: PositiveInt | None = None
    """Instead of parallel.expert. [ranks]"""
    pipeline: PositiveInt | None = None
    """Instead of parallel.pipeline. [ranks]"""
    context: PositiveInt | None = None
    """Instead of parallel.context. [ranks]"""
    expert_tensor: PositiveInt | None = None
    """Instead of parallel.expert_tensor. [ranks]"""
    pipeline_schedule: ScheduleName | None = None
    """Instead of parallel.pipeline_schedule."""
    pipeline_stages_per_rank: PositiveInt | None = None
    """Instead of parallel.pipeline_stages_per_rank, which a phase with its own pipeline or schedule
    does not inherit. [stages]"""
    pipeline_layers_per_stage: tuple[NonNegativeInt, ...] | None = None
    """Instead of parallel.pipeline_layers_per_stage, which a phase with its own pipeline or
    schedule does not inherit. [layers]"""
    recompute: tuple[RecomputedPart, ...] | None = None
    """Instead of parallel.recompute."""
    offload: tuple[OffloadedPart, ...] | None = None
    """Instead of parallel.offload."""

    def applied_to(self, run: ParallelConfig) -> ParallelConfig:
        """Returns the run's settings with those of the phase."""
        own = {name: value for name, value in self if value is not None}
        if own.keys() & {"pipeline", "pipeline_schedule"}:
            stages = {"pipeline_stages_per_rank": None, "pipeline_layers_per_stage": None}
            own = stages | own
        return run.model_copy(update=own)


class PhaseConfig(Section):
    """A phase of a run.

    Tokens are positions of rows; packing leaves about one in two thousand empty.
    """

    until_tokens: Tokens
    """Tokens of the whole run at the phase's end; its last step may exceed them. [tokens]"""
    attention: Literal["dense", "warmup", "sparse"]
    """`dense`: CSA layers attend to all entries, and their indexers are not used. `warmup`: as
    dense, and only the indexers are trained. `sparse`: CSA layers attend to the entries that the
    indexers select; everything is trained."""
    name: str | None = None
    """Name in logs and reports; null: attention and row length, and decay and
    quantisation if set."""
    seq_len: Annotated[int, Field(ge=2)] | None = None
    """Length of a row; null: data.seq_len. [tokens]"""
    global_batch_size: Rows | None = None
    """Rows of an optimizer step over all ranks; null: data.global_batch_size. [rows]"""
    micro_batch_size: Rows | None = None
    """Rows of a microbatch on a rank; null: data.micro_batch_size. [rows]"""
    initial_batch_size: Rows | None = None
    """Rows of the phase's first step, which grow to global_batch_size over rampup_tokens; null: no
    ramp. [rows]"""
    rampup_tokens: Tokens | None = None
    """Approximate length of the ramp from initial_batch_size. [tokens]"""
    source_weights: dict[str, float] | None = None
    """The sources' shares of the tokens; null: data.source_weights."""
    parallel: PhaseParallelConfig | None = None
    """Degrees of the phase; null: the run's."""
    decay: bool = False
    """Whether the learning rate decays: its cosine begins with the first such phase and ends with
    the run."""
    learning_rate: Annotated[float, Field(ge=0, le=100)] | None = None
    """Constant learning rate of the phase; null: the schedule's, or 1e-3 (V3.2) in a `warmup`."""
    mtp_loss_weight: LossWeight | None = None
    """Weight of the MTP loss; null: the run's."""
    router_bias_speed: BiasSpeed | None = None
    """Change of a router's bias per step; null: the run's, or 0 in a `warmup`."""
    quantisation: Quantisation | None = None
    """Quantisation-aware training; null: the run's."""

    @model_validator(mode="after")
    def _has_a_whole_ramp(self) -> "PhaseConfig":
        """Both `initial_batch_size` and `rampup_tokens`, or neither."""
        if (self.initial_batch_size is None) != (self.rampup_tokens is None):
            raise ValueError(
                "a ramp needs both `initial_batch_size` and `rampup_tokens`, or neither"
            )
        return self

    @model_validator(mode="after")
    def _trains_what_it_sets(self) -> "PhaseConfig":
        """A `warmup` sets neither `mtp_loss_weight` nor `router_bias_speed`."""
        if self.attention == "warmup":
            for field in ("mtp_loss_weight", "router_bias_speed"):
                if getattr(self, field) is not None:
                    raise ValueError(
                        f"{field} has no effect with attention = warmup, which trains only the "
                        "indexers; omit it"
                    )
        return self
