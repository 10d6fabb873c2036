"""Settings of the optimizer. Imports no torch, so that a login node can read them.

Defaults are those of V4 Flash (REP 4.2, where REP is the V4 report, arXiv 2606.19348).
"""

from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Decay = Annotated[float, Field(ge=0.0, le=1.0)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]

GROUPS = (
    "embedding",
    "head",
    "norms",
    "hyper_connections",
    "attention",
    "compressor",
    "indexer",
    "router",
    "experts",
    "shared_experts",
    "mtp",
)
"""The groups of parameters that settings can name; the model's table says what is in them."""


def _known_group(name: str) -> str:
    if name not in GROUPS:
        raise ValueError(f"there is no group '{name}'; the groups are {', '.join(GROUPS)}")
    return name


Group = Annotated[str, AfterValidator(_known_group)]


class Section(BaseModel):
    """A part of a config: unknown keys, NaN and infinity are refused, and values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class ScheduleConfig(Section):
    """Linear warm-up, then constant, then a cosine down to the final learning rate (REP 4.2)."""

    warmup_steps: NonNegativeInt = 2000
    """Steps of linear warm-up; the last of them runs at the full learning rate."""
    decay_fraction: float | None = Field(None, ge=0.0, le=1.0)
    """Share of the run, at its end, that the cosine takes: 0.1 where neither this nor decay_start
    is given. REP says "near the end" (L)."""
    decay_start: NonNegativeInt | None = None
    """First step of the cosine, counted from 0; the other way to say where the decay starts."""
    final_ratio: float = Field(0.1, ge=0.0, le=1.0)
    """Learning rate of the last step divided by the peak: 0.1 in Flash and in Pro."""

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.decay_start is None:
            return self
        if self.decay_fraction is not None:
            raise ValueError(
                f"decay_start is {self.decay_start} and decay_fraction is {self.decay_fraction}, "
                "but both say where the decay starts; set one of them to null"
            )
        if self.decay_start < self.warmup_steps:
            raise ValueError(
                f"decay_start is {self.decay_start}, inside the warm-up; it must be at least "
                f"warmup_steps, which is {self.warmup_steps}"
            )
        return self


class MuonConfig(Section):
    """Muon; where its options come from stands in docs/muon.md."""

    momentum: Momentum = 0.95
    momentum_start: Momentum = 0.85
    """Momentum of the first step, where `momentum_warmup_steps` is not 0."""
    momentum_warmup_steps: NonNegativeInt = 0
    """Steps in which the momentum grows linearly to `momentum`; V4 has none."""
    weight_decay: Decay = 0.1
    update_rms: PositiveFloat = 0.18
    """Root mean square of every update, before the learning rate; makes AdamW's rates fit Muon."""
    newton_schulz: Literal["hybrid", "polar_express"] = "hybrid"
    """The coefficients: V4's two sets, or those of Polar Express."""
    coarse_steps: NonNegativeInt = 8
    """Hybrid: steps with the coefficients that lift small singular values."""
    fine_steps: NonNegativeInt = 2
    """Hybrid: steps with the coefficients that converge to 1."""
    polar_express_steps: PositiveInt = 8
    """Polar Express: steps; all singular values from 1e-3 upwards are at 1 after 8."""
    gram: bool = False
    """Iterate on the Gram matrix of matrices at least twice as long as wide: fewer operations."""
    newton_schulz_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 on accelerators, as in the report, and fp32 on CPU."""
    query_matrices: Literal["whole", "per_head"] = "whole"
    """Whether wq_b (attention and indexer) is one matrix or one per head; unpublished (L)."""
    max_batch_bytes: PositiveInt | None = None
    """Most fp32 bytes of same-shape matrices that go through Newton–Schulz at once. Where null:
    2 MiB on CPU, which stays in its cache, and 256 MiB on accelerators."""


class AdamWConfig(Section):
    """AdamW, for what is not a matrix, the embedding and the output head."""

    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    eps: NonNegativeFloat = 1e-20
    weight_decay: Decay = 0.1
    """Also on norm weights, sinks, ape and hyper-connection biases: the report's list names no
    exception."""


class OptimConfig(Section):
    """Everything that turns gradients into the next weights."""

    learning_rate: PositiveFloat = 2.7e-4
    """Peak learning rate, of Muon and AdamW alike."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global gradient norm (V3); null never clips."""
    max_skipped_steps: NonNegativeInt = 3
    """Steps in a row that are skipped because loss or gradients are not finite; one more ends the
    run."""
    matrix_optimizer: Literal["muon", "adamw"] = "muon"
    """What updates the matrices; adamw, for everything, is the baseline to compare Muon with."""
    learning_rate_factors: dict[Group, NonNegativeFloat] = {}
    """By group of parameters, what its learning rate is multiplied by; 1 where none is given."""
    no_weight_decay: tuple[Group, ...] = ()
    """Groups of parameters without weight decay; V4 decays all."""
    schedule: ScheduleConfig = ScheduleConfig()
    muon: MuonConfig = MuonConfig()
    adamw: AdamWConfig = AdamWConfig()
