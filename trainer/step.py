"""The numbers of one optimizer step, on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.groups import GroupNumbers
from trainer.layers import LayerNumbers


@dataclass
class StepResult:
    """What a step gave; losses are token means over the global batch, in nats."""

    loss: float
    """What was differentiated: lm + weighted mtp + balance + indexer."""
    lm_loss: float
    mtp_loss: float
    balance_loss: float
    indexer_loss: float
    """Summed over the CSA layers; 0 where the attention has no objective."""
    grad_norm: float
    """Global norm before clipping."""
    learning_rate: float
    stage: int
    """Number of the stage, from 0."""
    expert_load_max: float
    """Largest load of an expert divided by the mean load, over all routed layers; 1 is balanced."""
    expert_load_min: float
    busiest_share: float
    """Largest share of the step's tokens that went to one expert of a learned layer."""
    first_share: list[float]
    """Of every learned layer, the mean over tokens of the largest weight's share."""
    tokens: int
    """Tokens of the global batch, padding not counted."""
    flops: float
    """Operations of forward and backward over all ranks."""
    seconds: float
    """From fetching the rows to the end of the update."""
    heldout_loss: float | None = None
    """Set by the evaluation, where one was due after this step."""
    layers: LayerNumbers | None = None
    """Of every layer, where a look was due after this step."""
    groups: GroupNumbers | None = None
    """Of every group of parameters, likewise."""
    heldout_by_source: dict[str, float] | None = None
    """Set by the evaluation, where the held-out text has several sources."""

    @classmethod
    def without_batch(cls, learning_rate: float, stage: int) -> StepResult:
        """Of a step whose batch was left out: there is no loss."""
        nan = math.nan
        return cls(
            loss=nan,
            lm_loss=nan,
            mtp_loss=nan,
            balance_loss=nan,
            indexer_loss=nan,
            grad_norm=nan,
            learning_rate=learning_rate,
            stage=stage,
            expert_load_max=nan,
            expert_load_min=nan,
            busiest_share=nan,
            first_share=[],
            tokens=0,
            flops=0.0,
            seconds=0.0,
        )
