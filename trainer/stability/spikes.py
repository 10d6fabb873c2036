"""What counts as a spike: numbers far above those of the steps before. Imports no torch.

A number's distance is a robust z-score. It is compared with the median of the last few steps, which
follows a loss that falls; how far steps usually are from such a median, their median absolute
deviation says, so that earlier outliers hide nothing. Only what is too large is a spike. A step
that spikes is no part of the past.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from trainer.config.stability import SpikeConfig

History = dict[str, list[float]]
"""By name the last numbers, and by the name with an apostrophe their distances from the median of
those before them; the newest last."""

_NORMAL = 1.4826  # standard deviation over median absolute deviation, of a normal distribution


def z_score(past: Sequence[float], value: float, floor: float) -> float:
    """Distance of `value` above the median of `past`, in deviations of at least `floor`."""
    middle = median(past)
    deviation = _NORMAL * median(abs(old - middle) for old in past)
    return (value - middle) / max(deviation, floor)


def severity(scores: Mapping[str, float]) -> float:
    """What is compared with the threshold, of the z-scores of `loss` and `grad_norm`.

    A small spike shows in both, and rarely do both stray by chance. A norm alone strays far more
    often than a loss: one odd document triples it, and clipping makes that harmless. So it counts
    twice the loss's score at most, or half as much as the loss would.
    """
    loss, norm = (max(scores.get(name, 0.0), 0.0) for name in ("loss", "grad_norm"))
    return max(math.hypot(loss, min(norm, 2.0 * loss)), norm / 2.0)


class SpikeDetector:
    """Judges a step by its loss, its gradient norm and its routers."""

    def __init__(self, settings: SpikeConfig) -> None:
        self.settings = settings

    def problem(self, history: History, numbers: Mapping[str, float]) -> str | None:
        """Why a step is a spike, in words; None, and the numbers join the past, if it is none.

        `numbers`: `loss`, `grad_norm`, `busiest` (the largest share of a step's tokens that went
        to one expert of a learned layer), and `router N` of any learned layer N: the mean share of
        the first choice in a token's weights. All finite.
        """
        found = self._collapse(history, numbers["busiest"]) or self._far(history, numbers)
        if found is None:
            for name, value in numbers.items():
                self._join(history, name, _scale(name, value))
        return found

    def _far(self, history: History, numbers: Mapping[str, float]) -> str | None:
        scores, limit = self.scores(history, numbers), self.settings.threshold
        if severity(scores) > limit:
            loss, norm = (max(scores[name], 0.0) for name in ("loss", "grad_norm"))
            return (
                f"the loss is {numbers['loss']:.4g} and the gradient norm "
                f"{numbers['grad_norm']:.4g}, {loss:.1f} and {norm:.1f} deviations too high"
            )
        for name, score in scores.items():
            if name.startswith("router") and score > limit:
                which = name.replace(" ", " of layer ")
                return (
                    f"the {which} gives {numbers[name]:.0%} of the weight to the first expert, "
                    f"{score:.1f} deviations too much"
                )
        return None

    def scores(self, history: History, numbers: Mapping[str, float]) -> dict[str, float]:
        """Robust z-scores by name, as far as there is enough of a past."""
        settings = self.settings
        floors = {
            "loss": settings.min_loss_deviation,
            "grad_norm": settings.min_grad_norm_deviation,
        }
        found = {}
        for name, value in numbers.items():
            past = history.get(_distances(name), [])
            if name != "busiest" and len(past) >= settings.min_history:
                floor = floors.get(name, settings.min_router_deviation)
                away = _scale(name, value) - median(history[name])
                found[name] = z_score(past, away, floor)
        return found

    def _join(self, history: History, name: str, value: float) -> None:
        last, past = history.setdefault(name, []), history.setdefault(_distances(name), [])
        if len(last) == self.settings.median_window:
            past.append(value - median(last))
        last.append(value)
        del last[: -self.settings.median_window], past[: -self.settings.deviation_window]

    def _collapse(self, history: History, busiest: float) -> str | None:
        past = history.get("busiest", [])
        if len(past) < self.settings.median_window or busiest < self.settings.router_collapse_share:
            return None
        if median(past) > self.settings.router_collapse_share / 2:
            return None  # it was like this before: a router that has not settled yet
        return (
            f"a router collapsed: {busiest:.0%} of the tokens go to one expert of a layer, where "
            f"it was {median(past):.0%}"
        )


def _distances(name: str) -> str:
    return f"{name}'"


def _scale(name: str, value: float) -> float:
    """Norms are as often twice as half what they were: their logarithms are even."""
    return math.log(max(value, 1e-30)) if name == "grad_norm" else value
