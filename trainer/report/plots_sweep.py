"""Charts of a sweep as SVG: curves, and settings in parallel coordinates."""

from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from trainer.metrics import Record
from trainer.report.plots import STYLE, points, to_svg


def _color(rank: float) -> tuple[float, float, float, float]:
    """Returns the colour of a rank between 0 (the best, dark) and 1 (the worst)."""
    return matplotlib.colormaps["viridis"](0.9 * rank)


def draw_curves(trials: Sequence[tuple[int, Sequence[Record]]], metric: str, ranks: int) -> str:
    """Draws the metric, a line per trial; `trials` pairs each with its setting's rank."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.8), layout="constrained")
        axes = figure.subplots()
        for rank, records in sorted(trials, key=lambda trial: -trial[0]):
            steps, values = points(records, metric)
            color = _color(rank / max(1, ranks - 1))
            axes.plot(steps, values, "o-", color=color, ms=3, lw=2 if rank == 0 else 1)
        axes.set_xlabel("step")
        axes.set_ylabel(metric)
        return to_svg(figure, f"{metric} of every trial")


def draw_parallel(settings: Sequence[tuple[dict[str, str], float]], metric: str) -> str:
    """Draws one line per setting through an axis per parameter; `settings` has the best first."""
    names = list(settings[0][0])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.8), layout="constrained")
        axes = figure.subplots()
        axes.grid(visible=False)
        heights = [_heights([values[name] for values, _ in settings]) for name in names]
        worst, best = max(v for _, v in settings), min(v for _, v in settings)
        span = (worst - best) or 1.0
        for i, (_, value) in reversed(list(enumerate(settings))):
            line = [column[i] for column in heights] + [(value - best) / span]
            color = _color(i / max(1, len(settings) - 1))
            axes.plot(range(len(line)), line, color=color, lw=2.4 if i == 0 else 1.2)
        for x, name in enumerate(names):
            axes.axvline(x, lw=0.6, color=STYLE["text.color"])
            texts = {values[name]: heights[x][i] for i, (values, _) in enumerate(settings)}
            if len(texts) <= 10:
                for text, y in texts.items():
                    axes.annotate(text, (x, y), xytext=(4, 3), textcoords="offset points", size=9)
        for y, value in ((0, best), (1, worst)):
            axes.annotate(
                f"{value:.4f}", (len(names), y), xytext=(4, 3), textcoords="offset points"
            )
        axes.set_xticks(range(len(names) + 1), [*names, metric])
        axes.set_yticks([])
        return to_svg(figure, "settings in parallel coordinates")


def _heights(texts: Sequence[str]) -> list[float]:
    """Returns positions on an axis from 0 to 1: by rank, numbers in their order."""
    try:
        order = sorted(set(texts), key=float)
    except ValueError:
        order = sorted(set(texts))
    return [order.index(text) / max(1, len(order) - 1) for text in texts]
