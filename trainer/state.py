"""What a run counts while it trains."""

from dataclasses import dataclass


@dataclass
class TrainState:
    """Progress of a run; saved in every checkpoint except for `stopping`."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens seen by the model over all steps and ranks, padding not counted."""
    stopping: bool = False
    """All ranks have agreed to end after the current step."""
