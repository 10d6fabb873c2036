"""What counts as a spike: numbers far above those of the steps before. Imports no torch.

A number's distance is its robust z-score: how far it is above the median of the last steps, in
standard deviations that are estimated from the median absolute deviation, so that earlier outliers
hide nothing. Only what is too large is a spike. A step that spikes is no part of the past.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from trainer.config_stability import SpikeConfig

History = dict[str, list[float]]
"""The last numbers by name, the newest last."""

_NORMAL = 1.4826  # standard deviation over median absolute deviation, of a normal distribution


def z_score(past: list[float], value: float, floor: float) -> float:
    """Distance of `value` above the median of `past`, in deviations of at least `floor`."""
    middle = median(past)
    deviation = _NORMAL * median(abs(old - middle) for old in past)
    return (value - middle) / max(deviation, floor)


class SpikeDetector:
    """Judges a step by its loss, its gradient norm and its busiest expert."""

    def __init__(self, settings: SpikeConfig) -> None:
        self.settings = settings

    def problem(self, history: History, numbers: Mapping[str, float]) -> str | None:
        """Why a step is a spike, in words; None, and the numbers join the past, if it is none.

        `numbers`: `loss`, `grad_norm`, and `busiest`, the largest share of a step's tokens that
        went to one expert of a learned layer. All finite.
        """
        found = self._collapse(history, numbers["busiest"])
        for name, score in self.scores(history, numbers).items():
            if found is None and score > self.settings.threshold:
                found = (
                    f"the {_WORDS[name]} is {numbers[name]:.4g}, {score:.1f} deviations above the "
                    f"median of the last {len(history[name])} steps"
                )
        if found is None:
            for name, value in numbers.items():
                history.setdefault(name, []).append(_scale(name, value))
                del history[name][: -self.settings.window]
        return found

    def scores(self, history: History, numbers: Mapping[str, float]) -> dict[str, float]:
        """Robust z-scores of loss and gradient norm, once there is enough of a past."""
        floors = {"loss": self.settings.loss_floor, "grad_norm": self.settings.norm_floor}
        return {
            name: z_score(history[name], _scale(name, numbers[name]), floor)
            for name, floor in floors.items()
            if len(history.get(name, [])) >= self.settings.least_history
        }

    def _collapse(self, history: History, busiest: float) -> str | None:
        past = history.setdefault("busiest", [])
        if len(past) < self.settings.least_history or busiest < self.settings.collapse:
            return None
        if median(past) > self.settings.collapse / 2:
            return None  # it was like this before: a router that has not settled yet
        return (
            f"a router collapsed: {busiest:.0%} of the tokens go to one expert of a layer, where "
            f"it was {median(past):.0%}"
        )


def _scale(name: str, value: float) -> float:
    """Norms are as often twice as half what they were: their logarithms are even."""
    return math.log(max(value, 1e-30)) if name == "grad_norm" else value


_WORDS = {"loss": "loss", "grad_norm": "gradient norm"}
