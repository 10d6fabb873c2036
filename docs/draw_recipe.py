"""Draws the picture of recipe.md from a finished run: python docs/draw_recipe.py RUN [file.png]."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import matplotlib

from trainer.config import load_run
from trainer.metrics import read_metrics
from trainer.report.plots import CHARTS, STYLE, picture
from trainer.report.run import phase_marks

TARGET = Path(__file__).parent / "images" / "recipe-demo.png"


def main() -> None:
    """Draws the loss of a run over its steps with the phases marked, as the report does."""
    config = load_run(sys.argv[1])
    records = read_metrics(config.run_dir / "metrics.jsonl")
    chart = replace(next(chart for chart in CHARTS if chart.title == "Loss"), title="")
    with matplotlib.rc_context(STYLE):
        figure = picture(chart, records, phase_marks(config))
        figure.savefig(sys.argv[2] if len(sys.argv) > 2 else TARGET, dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
