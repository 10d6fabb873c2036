"""Shared by the scripts that draw: colours, shapes, and saving a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

# Okabe and Ito's colours, safe for colour-blind readers, and lighter shades of them.
BLUE, ORANGE, GREEN, SKY = "#0072B2", "#D55E00", "#009E73", "#56B4E9"
FOUR = ("#7FB8D8", "#F2A66A", "#80CEB9", "#E5BCD3")
GREY, PALE, INK = "#8A8A8A", "#EDEDED", "#222222"
plt.rcParams.update(
    {"font.size": 10, "text.color": INK, "axes.edgecolor": GREY, "axes.titlesize": 11}
)


def blank(width: float, height: float, right: float, top: float) -> tuple[Any, Any]:
    """Returns a figure, sized in inches, and its axes from (0, 0) to (right, top), y downwards."""
    figure, ax = plt.subplots(figsize=(width, height))
    bare(ax, right, top)
    return figure, ax


def bare(ax: Any, right: float, top: float) -> None:
    """Removes frame and ticks; y grows downwards."""
    ax.set(xlim=(0, right), ylim=(top, 0))
    ax.axis("off")


def cell(ax: Any, x: float, y: float, w: float, h: float, color: str, **more: Any) -> None:
    """Draws a filled rectangle with a white edge."""
    ax.add_patch(Rectangle((x, y), w, h, **{"fc": color, "ec": "white", "lw": 1.2, **more}))


def arrow(ax: Any, start: tuple[float, float], end: tuple[float, float], **more: Any) -> None:
    """Draws an arrow between two points."""
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "color": INK, "lw": 1.1, **more}
    ax.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **style))


def save(figure: Any, folder: Path, name: str, tight: bool = True) -> None:
    """Writes parallel-NAME.png into the folder."""
    options = {"bbox_inches": "tight", "pad_inches": 0.08} if tight else {}
    path = folder / f"parallel-{name}.png"
    figure.savefig(path, dpi=110, metadata={"Software": None}, **options)
    plt.close(figure)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
