"""The result of one optimizer step, on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

LayerStats = dict[str, list[float | None]]
"""By metric, its value in every layer (then the MTP block), or None where a layer has no such
thing."""

GroupStats = dict[str, dict[str, float]]
"""By metric, its value for every group of parameters."""


@dataclass
class StepResult:
    """The metrics of a step; losses are token means over the global batch, in nats.

    A step whose batch was skipped has a learning rate and a phase, and neither losses nor tokens.
    """

    learning_rate: float
    phase: int
    """Number of the phase, from 0."""
    loss: float = math.nan
    """The loss that was differentiated: lm + weighted mtp + balance + indexer."""
    lm_loss: float = math.nan
    mtp_loss: float = math.nan
    balance_loss: float = math.nan
    indexer_loss: float = math.nan
    """Summed over the CSA layers; 0 where the attention has no objective."""
    grad_norm: float = math.nan
    """Global norm before clipping."""
    expert_load_max: float = math.nan
    """Largest load of an expert divided by the mean load, over all routed layers; 1 is balanced."""
    expert_load_min: float = math.nan
    """Smallest load of an expert divided by the mean load."""
    max_expert_share: float = math.nan
    """Largest share of the step's tokens that went to one expert of a learned layer."""
    top1_weight_share: list[float] = field(default_factory=list)
    """For every learned layer, the largest gate weight's share of a token's weights, token mean."""
    tokens: int = 0
    """Tokens of the global batch, without padding."""
    flops: float = 0.0
    """FLOPs of forward and backward over all ranks."""
    epochs: dict[str, float] = field(default_factory=dict)
    """By source of the training data, how many epochs the run has read so far."""
    seconds: float = 0.0
    """Wall time on the host from before the step's batch is fetched until the step returns, layer
    stats included; the device may still be updating."""
    work_seconds: tuple[float, ...] = ()
    """By rank, how long it worked in the step before, waits for other ranks not included; empty in
    a step whose batch was skipped."""
    validation_loss: float | None = None
    """Set where an evaluation was due after this step."""
    validation_bits_per_byte: float | None = None
    """Set with it where the tokenizer's ids have definite bytes."""
    validation_by_source: dict[str, float] | None = None
    """Set with it where the validation text has several sources."""
    validation_bits_per_byte_by_source: dict[str, float] | None = None
    """Set with it where the tokenizer's ids have definite bytes."""
    samples: dict[str, str] | None = None
    """Set with it where the config has prompts: by prompt, its continuation."""
    tasks: dict[str, float] | None = None
    """Set on the first rank where tasks were due after this step: scores by task/metric."""
    post: dict[str, float] | None = None
    """Set where the run trains on its own samples: what is measured about them and their loss."""
    layers: LayerStats | None = None
    """Set where layer stats were due after this step."""
    groups: GroupStats | None = None
    """Set with them: stats of every group of parameters."""

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient norm are finite, so that the weights can be updated."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class RolledBack:
    """The outcome of a step that was a spike: it has no result, the run resumes earlier."""

    reason: str
    step: int
    """Optimizer steps done in the state that was restored."""
