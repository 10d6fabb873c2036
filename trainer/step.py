"""The numbers of one optimizer step, on the host."""

from dataclasses import dataclass

from trainer.layers import LayerNumbers


@dataclass
class StepResult:
    """What a step gave; losses are token means over the global batch, in nats."""

    loss: float
    """What was differentiated: lm + weighted mtp + balance."""
    lm_loss: float
    mtp_loss: float
    balance_loss: float
    grad_norm: float
    """Global norm before clipping."""
    learning_rate: float
    expert_load_max: float
    """Largest load of an expert divided by the mean load, over all routed layers; 1 is balanced."""
    expert_load_min: float
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
