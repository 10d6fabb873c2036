"""What a run counts while it trains."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Progress of a run; saved in every checkpoint except for `stopping`."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens seen by the model over all steps and ranks, padding not counted."""
    skipped_steps: int = 0
    """Of `step`, those without an update, because loss or gradients were not finite."""
    skipped_in_row: int = 0
    """Of those, the newest without an update between them."""
    anticipation_since: int | None = None
    """First step of the present anticipatory routing, or of the last one; None before any."""
    anticipation_until: int | None = None
    """Its first step without; None where it goes on to the end of the run."""
    rollbacks: int = 0
    """How often the run has turned back."""
    suspects: list[int] = field(default_factory=list)
    """Steps, counted from 0, at which a spike was seen."""
    left_out: list[int] = field(default_factory=list)
    """Steps, counted from 0, whose batch is passed over."""
    history: dict[str, list[float]] = field(default_factory=dict)
    """What the next step is compared with; see spikes.py."""
    stopping: bool = False
    """All ranks have agreed to end after the current step."""

    def saved(self) -> dict[str, Any]:
        """A copy of what a checkpoint keeps."""
        values = dataclasses.asdict(self)
        del values["stopping"]
        return values

    def go_on_from(self, saved: Mapping[str, Any]) -> None:
        """Take over what `saved` gave; what an older checkpoint lacks stays as it is."""
        for name in self.saved():
            setattr(self, name, saved.get(name, getattr(self, name)))

    def anticipates(self, step: int) -> bool:
        """Whether a step is one of anticipatory routing."""
        since, until = self.anticipation_since, self.anticipation_until
        return since is not None and since <= step and (until is None or step < until)
