"""The progress of a run, saved in every checkpoint."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_OLD_NAMES = {
    "consecutive_skips": "skipped_in_row",
    "anticipation_start": "anticipation_since",
    "anticipation_end": "anticipation_until",
    "spike_steps": "suspects",
    "skipped_batches": "left_out",
}
"""What older checkpoints call these fields in state.json."""
_OLD_HISTORY = {"busiest": "max_expert_share", "busiest'": "max_expert_share'"}
"""What the names of older checkpoints in `history` are now."""


@dataclass
class TrainState:
    """Progress of a run; every field but `stopping` and `starts_again` is saved."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on over all steps and ranks, without padding."""
    skipped_steps: int = 0
    """Steps without an update because loss or gradients were not finite; they count in `step`."""
    consecutive_skips: int = 0
    """Such steps since the last update."""
    skipping_since: int | None = None
    """Optimizer steps done before the first of these; None where the last step had an update."""
    anticipation_start: int | None = None
    """First step, counted from 0, of the current anticipatory routing or the last one; None before
    any."""
    anticipation_end: int | None = None
    """First step after it, counted from 0; None where it lasts to the end of the run."""
    failed_saves: int = 0
    """Checkpoints that could not be written, as the first rank knows."""
    rollbacks: int = 0
    """How often the run has rolled back."""
    spike_steps: list[int] = field(default_factory=list)
    """Steps, counted from 0, that were a spike."""
    skipped_batches: list[int] = field(default_factory=list)
    """Steps, counted from 0, whose batch is skipped."""
    history: dict[str, list[float]] = field(default_factory=dict)
    """Recent metrics that the next step is compared with; see stability/spikes.py."""
    stopping: bool = False
    """All ranks have agreed to stop after the current step."""
    starts_again: bool = False
    """These processes have ended, and others with the degrees of the next step have to begin."""

    def to_dict(self) -> dict[str, Any]:
        """Returns a copy of the fields that a checkpoint saves."""
        values = dataclasses.asdict(self)
        del values["stopping"], values["starts_again"]
        return values

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes over saved fields; one that an older checkpoint lacks keeps its value."""
        for name in self.to_dict():
            old = saved.get(_OLD_NAMES.get(name, name), getattr(self, name))
            setattr(self, name, saved.get(name, old))
        if self.consecutive_skips and self.skipping_since is None:  # of an older checkpoint
            self.skipping_since = self.step - self.consecutive_skips
        self.history = {_OLD_HISTORY.get(name, name): past for name, past in self.history.items()}

    def doubt(self) -> str:
        """Returns a clause about weights that may be ruined, or an empty text."""
        if self.skipping_since is None:
            return ""
        return (
            f"the steps from {self.skipping_since + 1} to {self.step} were skipped, since loss or "
            "gradients were not finite: the weights may be ruined"
        )

    def anticipatory_routing_at(self, step: int) -> bool:
        """Whether a step is routed by older weights (report §4.2.3)."""
        start, end = self.anticipation_start, self.anticipation_end
        return start is not None and start <= step and (end is None or step < end)
