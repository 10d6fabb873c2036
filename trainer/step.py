"""The numbers of one optimizer step, on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

LayerNumbers = dict[str, list[float | None]]
"""By metric, its value in every layer (then the MTP block), or None where a layer has no such
thing."""

GroupNumbers = dict[str, dict[str, float]]
"""By metric, its value for every group of parameters."""


@dataclass
class StepResult:
    """What a step gave; losses are token means over the global batch, in nats.

    A step whose batch was left out has a rate and a phase, and neither losses nor tokens.
    """

    learning_rate: float
    phase: int
    """Number of the phase, from 0."""
    loss: float = math.nan
    """What was differentiated: lm + weighted mtp + balance + indexer."""
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
    busiest_share: float = math.nan
    """Largest share of the step's tokens that went to one expert of a learned layer."""
    first_share: list[float] = field(default_factory=list)
    """Of every learned layer, the mean over tokens of the largest weight's share."""
    tokens: int = 0
    """Tokens of the global batch, padding not counted."""
    flops: float = 0.0
    """Operations of forward and backward over all ranks."""
    seconds: float = 0.0
    """From fetching the rows to the end of the update."""
    validation_loss: float | None = None
    """Set by the evaluation, where one was due after this step."""
    layers: LayerNumbers | None = None
    """Of every layer, where a look was due after this step."""
    groups: GroupNumbers | None = None
    """Of every group of parameters, likewise."""
    validation_by_source: dict[str, float] | None = None
    """Set by the evaluation, where the validation text has several sources."""

    @property
    def is_finite(self) -> bool:
        """Whether the weights can be updated with it."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)
