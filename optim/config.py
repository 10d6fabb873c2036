"""Settings of the optimizer. Imports no torch, so that a login node can read them.

Defaults are those of V4 Flash (report §4.2).
"""

from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Decay = Annotated[float, Field(ge=0.0, le=1.0)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
Iterations = Annotated[int, Field(ge=0, le=100)]
LearningRateFactor = Annotated[float, Field(ge=0, le=1e4)]

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
"""Groups of parameters that settings can name; the model's table of parameters assigns them.
`mtp` has only the MTP block's e_proj and h_proj; its other parameters are in the other groups."""


def _known_group(name: str) -> str:
    if name not in GROUPS:
        raise ValueError(f"there is no group '{name}'; the groups are {', '.join(GROUPS)}")
    return name


Group = Annotated[
    str, AfterValidator(_known_group), Field(description=f"one of {', '.join(GROUPS)}")
]


class Section(BaseModel):
    """A part of a config: unknown keys, NaN and infinity are refused, and values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class ScheduleConfig(Section):
    """Linear warm-up, constant, then a cosine down to the final learning rate (report §4.2)."""

    warmup_steps: NonNegativeInt = 2000
    """Length of the linear warm-up, whose last step has the full learning rate. [steps]"""
    decay_fraction: float | None = Field(None, ge=0.0, le=1.0)
    """Share of the run, at its end, with the cosine. Null: 0.1, unless decay_start or a phase with
    decay is set; unpublished (report §4.2: "near the end")."""
    decay_start: NonNegativeInt | None = None
    """First step of the cosine, counted from 0; the alternative to decay_fraction. [steps]"""
    final_ratio: float = Field(0.1, ge=0.0, le=1.0)
    """Learning rate of the last step divided by the peak."""

    @model_validator(mode="after")
    def _has_one_decay(self) -> Self:
        """At most one of `decay_start` and `decay_fraction`."""
        if self.decay_start is not None and self.decay_fraction is not None:
            raise ValueError(
                f"decay_start is {self.decay_start} and decay_fraction is {self.decay_fraction}, "
                "but both define where the decay starts; set one of them to null"
            )
        return self

    @model_validator(mode="after")
    def _warms_up_first(self) -> Self:
        """`decay_start` is at least `warmup_steps`."""
        if self.decay_start is not None and self.decay_start < self.warmup_steps:
            raise ValueError(
                f"decay_start is {self.decay_start}, inside the warm-up; it must be at least "
                f"warmup_steps, which is {self.warmup_steps}"
            )
        return self


class MuonConfig(Section):
    """Muon, for matrices; docs/muon.md has the sources of its options."""

    momentum: Momentum = 0.95
    """Decay of the momentum buffer (Nesterov)."""
    momentum_start: Momentum = 0.85
    """Momentum of the first step, where `momentum_warmup_steps` is not 0."""
    momentum_warmup_steps: NonNegativeInt = 0
    """Steps over which the momentum grows linearly to `momentum`; V4 has none. [steps]"""
    weight_decay: Decay = 0.1
    """Decoupled weight decay, as a factor of the learning rate."""
    update_rms: float = Field(0.18, gt=0, le=1e4)
    """Root mean square of every update before the learning rate, so that Muon can use AdamW's."""
    newton_schulz: Literal["hybrid", "polar_express"] = "hybrid"
    """Coefficients of Newton–Schulz: V4's two sets, or those of Polar Express."""
    coarse_steps: Iterations = 8
    """Hybrid: iterations with the coefficients that raise small singular values. [iterations]"""
    fine_steps: Iterations = 2
    """Hybrid: iterations with the coefficients that converge to 1. [iterations]"""
    polar_express_steps: int = Field(8, ge=1, le=100)
    """Polar Express: iterations; 8 bring all singular values of at least 1e-3 to 1. [iterations]"""
    gram: bool = False
    """Iterate on the Gram matrix of matrices at least twice as long as wide, for fewer FLOPs."""
    newton_schulz_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of Newton–Schulz; `auto` is bf16 on accelerators, as in the report, and fp32 on
    CPU."""
    query_matrices: Literal["whole", "per_head"] = "whole"
    """Whether wq_b (attention and indexer) is one matrix or one per head; unpublished."""
    max_batch_bytes: PositiveInt | None = None
    """Maximum fp32 size of a batch of same-shape matrices in Newton–Schulz. Null: 2 MiB on CPU,
    which fits its cache, and 1 GiB on accelerators. [bytes]"""

    @model_validator(mode="after")
    def _iterates(self) -> Self:
        """At least one of `coarse_steps` and `fine_steps` with `newton_schulz` = hybrid."""
        if self.newton_schulz == "hybrid" and not self.coarse_steps + self.fine_steps:
            raise ValueError(
                "coarse_steps and fine_steps are both 0, so that updates would not be "
                "orthogonalised; V4's are 8 and 2"
            )
        return self


class AdamWConfig(Section):
    """AdamW, for vectors, the embedding and the output head; docs/optimizer.md has the list."""

    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    """Decay rates of the first and the second moment."""
    eps: float = Field(1e-20, ge=1e-30, le=1.0)
    """Added to the root of the second moment, in fp32."""
    weight_decay: Decay = 0.1
    """Decoupled weight decay, as a factor of the learning rate; also of norm weights, sinks, ape,
    and hyper-connection biases, since the report's list names no exception."""


class OptimConfig(Section):
    """Everything that turns gradients into the next weights."""

    learning_rate: float = Field(2.7e-4, gt=0, le=100)
    """Peak learning rate, of Muon and AdamW alike."""
    clip_norm: PositiveFloat | None = 1.0
    """Maximum global gradient norm (V3); null turns clipping off."""
    max_skipped_steps: NonNegativeInt = 3
    """Maximum consecutive steps skipped because loss or gradients are not finite; one more ends the
    run, or rolls it back where stability.spikes is set. [steps]"""
    matrix_optimizer: Literal["muon", "adamw"] = "muon"
    """Optimizer of the matrices; adamw, then used for everything, is the baseline for Muon."""
    learning_rate_factors: dict[Group, LearningRateFactor] = {}
    """Factors of the learning rate by group of parameters, 1 for groups without one."""
    no_weight_decay: tuple[Group, ...] = ()
    """Groups of parameters without weight decay; V4 decays all of them."""
    schedule: ScheduleConfig = ScheduleConfig()
    muon: MuonConfig = MuonConfig()
    adamw: AdamWConfig = AdamWConfig()
