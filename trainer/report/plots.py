"""Charts of a run as SVG in the text colour of the page that contains them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

SERIES_COLORS = ("#3b82c4", "#e07b39", "#2f9e76", "#7a5bb5", "#c24b4b")
MAX_POINTS = 1200  # more cannot be distinguished on a screen
_INK = "#010203"  # placeholder of the page's text colour, see `to_svg`
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "v4",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Curve:
    """One line of a chart: the records' `key` over their step."""

    key: str
    label: str
    color: str
    style: Literal["noisy", "exact", "dots"] = "noisy"
    """A smoothed line over the faint values, the values themselves, or sparse values as dots."""


@dataclass(frozen=True)
class Chart:
    """A titled chart with one or more curves; `unit` labels the y axis."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    wide: bool = False


Mark = tuple[int, str]
"""A phase: the step after which it begins, and its name."""

CHARTS = (
    Chart(
        "Loss",
        "nats per token",
        (
            Curve("lm_loss", "training", "#3b82c4"),
            Curve("validation_loss", "validation", "#e07b39", style="dots"),
        ),
        wide=True,
    ),
    Chart(
        "Validation text",
        "bits per byte",
        (Curve("validation_bits_per_byte", "", "#e07b39", style="dots"),),
    ),
    Chart("MTP loss", "nats per token", (Curve("mtp_loss", "", "#3b82c4"),)),
    Chart("Balance loss", "weighted, all layers", (Curve("balance_loss", "", "#3b82c4"),)),
    Chart(
        "Indexer loss",
        "nats per query, all layers",
        (Curve("indexer_loss", "", "#c24b4b"),),
    ),
    Chart("Learning rate", "", (Curve("learning_rate", "", "#7a5bb5", style="exact"),)),
    Chart("Gradient norm", "norm before clipping", (Curve("grad_norm", "", "#7a5bb5"),)),
    Chart("Throughput", "tokens per second", (Curve("tokens_per_second", "", "#2f9e76"),)),
    Chart(
        "Expert load",
        "load / mean load",
        (
            Curve("expert_load_max", "most loaded expert", "#c24b4b"),
            Curve("expert_load_min", "least loaded expert", "#2f9e76"),
        ),
    ),
)


def points(records: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Returns steps and values of the records that have `key`, averaged down to MAX_POINTS."""
    values_by_step = [(record["step"], value_of(record, key)) for record in records]
    pairs = [(step, value) for step, value in values_by_step if value is not None]
    size = -(-len(pairs) // MAX_POINTS) or 1
    steps, values = [], []
    for start in range(0, len(pairs), size):
        group = pairs[start : start + size]
        steps.append(group[-1][0])
        values.append(sum(value for _, value in group) / len(group))
    return steps, values


def value_of(record: dict[str, Any], key: str) -> float | None:
    """Returns a number of a record, or None; `name.part` is one entry of a dictionary."""
    name, _, part = key.partition(".")
    value = record.get(name)
    return value.get(part) if part and value is not None else value


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """Returns the mean over each value and up to `reach` neighbours on both sides: no lag."""
    totals = list(accumulate(values, initial=0.0))
    means = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        means.append((totals[i + near + 1] - totals[i - near]) / (2 * near + 1))
    return means


_BY_SOURCE = (
    ("validation_by_source", "Validation loss by source", "nats per token"),
    ("validation_bits_per_byte_by_source", "Validation text by source", "bits per byte"),
)


def source_charts(records: Sequence[dict[str, Any]]) -> list[Chart]:
    """Returns a chart of each number of the validation text by source that records have."""
    charts = []
    for key, title, unit in _BY_SOURCE:
        if names := dict.fromkeys(n for record in records for n in record.get(key, {})):
            charts.append(Chart(title, unit, _dots(key, list(names))))
    return charts


def task_charts(records: Sequence[dict[str, Any]]) -> list[Chart]:
    """Returns a chart of each metric of the tasks, with a curve for each task."""
    names = dict.fromkeys(name for record in records for name in record.get("tasks", {}))
    metrics: dict[str, list[str]] = {}
    for name in names:
        if not name.endswith("_stderr"):
            metrics.setdefault(name.rpartition("/")[2], []).append(name)
    return [Chart("Tasks", metric, _dots("tasks", some)) for metric, some in metrics.items()]


def _dots(key: str, names: Sequence[str]) -> tuple[Curve, ...]:
    colours = cycle(SERIES_COLORS)
    return tuple(Curve(f"{key}.{name}", name, next(colours), style="dots") for name in names)


def draw(
    chart: Chart,
    records: Sequence[dict[str, Any]],
    marks: Sequence[Mark] = (),
    spikes: Sequence[int] = (),
) -> str:
    """Returns the chart as an `<svg>` element; wide charts show the names of the marks.

    `spikes` are steps at which the run rolled back.
    """
    with matplotlib.rc_context(STYLE):
        return to_svg(picture(chart, records, marks, spikes), chart.title)


def picture(
    chart: Chart,
    records: Sequence[dict[str, Any]],
    marks: Sequence[Mark] = (),
    spikes: Sequence[int] = (),
) -> Figure:
    """Returns the chart as a figure in the current style."""
    figure = Figure(figsize=(10.4, 3.6) if chart.wide else (5.1, 2.9), layout="constrained")
    axes = figure.subplots()
    for curve in chart.curves:
        steps, values = points(records, curve.key)
        if not steps:
            continue
        if curve.style == "dots":
            axes.plot(steps, values, "o-", color=curve.color, ms=4.5, lw=1.2, label=curve.label)
            continue
        if curve.style == "noisy" and len(values) > 40:
            axes.plot(steps, values, color=curve.color, lw=0.7, alpha=0.4)
            values = smooth(values, len(values) // 60 + 1)
        axes.plot(steps, values, color=curve.color, lw=1.7, label=curve.label)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel(chart.unit)
    for step in spikes:
        axes.axvline(step, color="#c24b4b", lw=1.0, ls="--", alpha=0.7)
    last = records[-1]["step"] if records else 0
    for (step, name), line in zip(marks, lines_of([step for step, _ in marks], last), strict=True):
        axes.axvline(step + 0.5, color=_INK, lw=0.8, ls=(0, (4, 3)), alpha=0.5)
        if chart.wide:
            place, height = axes.get_xaxis_transform(), 1.01 + 0.06 * line
            axes.text(step + 1, height, name, transform=place, fontsize=8.5, va="bottom")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return figure


def lines_of(starts: Sequence[int], last: int) -> list[int]:
    """Returns the text line above the chart for each name, so that no two names overlap.

    A name takes less than a tenth of a wide chart that ends at step `last`.
    """
    lines: list[int] = []  # where the last name on each begins
    chosen = []
    for start in starts:
        free = (n for n, before in enumerate(lines) if start - before >= last / 10)
        line = next(free, len(lines))
        lines[line : line + 1] = [start]
        chosen.append(line)
    return chosen


def draw_layers(records: Sequence[dict[str, Any]], key: str, title: str, unit: str) -> str:
    """Returns a heat map of a number of every layer over the steps, as an `<svg>` element."""
    sampled = [(record["step"], record["layers"][key]) for record in records if "layers" in record]
    return heat_map(sampled, title, "layer", unit)


def heat_map(
    columns: Sequence[tuple[int, Sequence[float]]], title: str, rows: str, unit: str
) -> str:
    """Returns a heat map over the steps, as an `<svg>` element.

    `columns` are the values of all rows at a step; `rows` is what a row stands for.
    """
    columns = columns[:: -(-len(columns) // MAX_POINTS)]
    height = len(columns[0][1])
    values = np.array([column for _, column in columns], float).T
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(10.4, 1.2 + min(0.16 * height + 0.5, 6.0)), layout="constrained")
        axes = figure.subplots()
        edges = [row - 0.5 for row in range(height + 1)]
        steps = [0, *(step for step, _ in columns)]
        colours = axes.pcolormesh(steps, edges, values, cmap="viridis")
        axes.invert_yaxis()
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel(rows)
        bar = figure.colorbar(colours, ax=axes, label=unit)
        bar.outline.set_visible(False)
        return to_svg(figure, title)


def histogram(title: str, unit: str, series: dict[str, NDArray[np.int64]]) -> str:
    """Returns a histogram of each series over logarithmic bins, as an `<svg>` element."""
    longest = max((int(values.max()) for values in series.values() if len(values)), default=2)
    edges = 2.0 ** np.arange(0, np.ceil(np.log2(longest + 1)) + 0.5, 0.5)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.2), layout="constrained")
        axes = figure.subplots()
        for (label, values), color in zip(series.items(), cycle(SERIES_COLORS), strict=False):
            if not len(values):
                continue
            shares = np.histogram(values, edges)[0] / len(values)
            axes.stairs(shares, edges, color=color, lw=1.5, label=label)
            axes.stairs(shares, edges, color=color, alpha=0.15, fill=True)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.set_xlabel(unit)
        axes.set_ylabel("fraction of documents")
        axes.legend()
        return to_svg(figure, title)


def to_svg(figure: Figure, title: str) -> str:
    """Returns the figure as an `<svg>` element in the page's text colour."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    svg = text[text.index("<svg") :].replace(_INK, "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
