"""Detects spikes: metrics far above those of the steps before. Imports no torch.

A metric's distance is its value minus the median of the last few steps, which follows a falling
loss. Its score is the robust z-score of that distance among those of earlier steps: their median is
subtracted and the result divided by their median absolute deviation, which outliers hardly change.
Only values that are too large are a spike. A spike does not enter the history.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from trainer.config import SpikeConfig

History = dict[str, list[float]]
"""Keys `NAME`: the metric's last values. Keys `NAME'`: each value's distance from the median of the
values before it. The newest is last."""

_NORMAL = 1.4826  # standard deviation over median absolute deviation, of a normal distribution


def z_score(past: Sequence[float], value: float, floor: float) -> float:
    """Distance of `value` above the median of `past`, in deviations of at least `floor`."""
    middle = median(past)
    deviation = _NORMAL * median(abs(old - middle) for old in past)
    return (value - middle) / max(deviation, floor)


def severity(scores: Mapping[str, float]) -> float:
    """Combines the z-scores of `loss` and `grad_norm` into what is compared with the threshold.

    A small spike shows in both, and both are rarely far off by chance. A norm alone is far off much
    more often than a loss: one odd document triples it, and clipping makes that harmless. So
    combined with the loss it counts at most twice the loss's score, and alone it counts half.
    """
    loss, norm = (max(scores.get(name, 0.0), 0.0) for name in ("loss", "grad_norm"))
    return max(math.hypot(loss, min(norm, 2.0 * loss)), norm / 2.0)


class SpikeDetector:
    """Judges a step by its loss, its gradient norm and its routers."""

    def __init__(self, settings: SpikeConfig) -> None:
        self.settings = settings

    def problem(self, history: History, metrics: Mapping[str, float]) -> str | None:
        """Returns why a step is a spike; None, after adding it to the history, if it is none.

        `metrics`: `loss`, `grad_norm`, `max_expert_share` (the largest share of a step's tokens
        that went to one expert of a learned layer), and `router N` for learned layers N: the mean
        share of the largest gate weight in a token's weights. All finite.
        """
        problem = self._collapse(history, metrics["max_expert_share"])
        problem = problem or self._outlier(history, metrics)
        if problem is None:
            for name, value in metrics.items():
                self._append(history, name, _scale(name, value))
        return problem

    def _outlier(self, history: History, metrics: Mapping[str, float]) -> str | None:
        scores, limit = self.scores(history, metrics), self.settings.threshold
        if severity(scores) > limit:
            loss, norm = (max(scores[name], 0.0) for name in ("loss", "grad_norm"))
            return (
                f"the loss is {metrics['loss']:.4g} and the gradient norm "
                f"{metrics['grad_norm']:.4g}, {loss:.1f} and {norm:.1f} deviations too high"
            )
        for name, score in scores.items():
            if name.startswith("router") and score > limit:
                router = name.replace(" ", " of layer ")
                return (
                    f"the {router} gives {metrics[name]:.0%} of a token's weight to its top expert "
                    f"on average, {score:.1f} deviations too much"
                )
        return None

    def scores(self, history: History, metrics: Mapping[str, float]) -> dict[str, float]:
        """Returns robust z-scores by metric, for those with enough history."""
        settings = self.settings
        floors = {
            "loss": settings.min_loss_deviation,
            "grad_norm": settings.min_grad_norm_deviation,
        }
        scores = {}
        for name, value in metrics.items():
            past = history.get(_distances(name), [])
            if name != "max_expert_share" and len(past) >= settings.min_history:
                floor = floors.get(name, settings.min_router_deviation)
                distance = _scale(name, value) - median(history[name])
                scores[name] = z_score(past, distance, floor)
        return scores

    def _append(self, history: History, name: str, value: float) -> None:
        last, past = history.setdefault(name, []), history.setdefault(_distances(name), [])
        if len(last) == self.settings.median_window:
            past.append(value - median(last))
        last.append(value)
        del last[: -self.settings.median_window], past[: -self.settings.deviation_window]

    def _collapse(self, history: History, share: float) -> str | None:
        past = history.get("max_expert_share", [])
        if len(past) < self.settings.median_window or share < self.settings.router_collapse_share:
            return None
        if median(past) > self.settings.router_collapse_share / 2:
            return None  # it was like this before: a router that has not settled yet
        return (
            f"a router collapsed: {share:.0%} of the tokens go to one expert of a layer, where "
            f"it was {median(past):.0%}"
        )


def _distances(name: str) -> str:
    return f"{name}'"


def _scale(name: str, value: float) -> float:
    """The logarithm of a norm, since a norm doubles as often as it halves; other values as is."""
    return math.log(max(value, 1e-30)) if name == "grad_norm" else value
