"""Losses of bf16 and FP8 compared with fp32 over the same steps, rows and initial weights.

Trains a config once in each precision, in separate folders, and compares the losses of all steps.

    python -m benchmarks.steps.precision [CONFIG] [--steps 200] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

EXACT = "fp32"
OTHERS = ("bf16", "fp8")


def losses(
    config: str, folder: Path, precision: str, steps: int, overrides: list[str]
) -> list[float]:
    """Trains in `precision` and returns the language-model loss of every step."""
    command = [sys.executable, "-m", "trainer", config, f"run_dir={folder}", f"steps={steps}"]
    command += [f"precision={precision}", "metrics.wandb.mode=disabled", "evaluation.every=0"]
    command += ["checkpoint.every=0", "metrics.every=1", *overrides]
    subprocess.run(command, check=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record["lm_loss"] for record in records if "lm_loss" in record]


def table_of(curves: dict[str, list[float]], every: int) -> Table:
    """Returns means over `every` steps: fp32's loss, and the others' losses and differences."""
    table = Table(title="loss, nats, means of steps")
    headings = [EXACT]
    for name in OTHERS:
        headings += [name, f"{name} - {EXACT}", "largest of a step"]
    for heading in ("steps", *headings):
        table.add_column(heading, justify="right")
    exact = np.array(curves[EXACT])
    for first in range(0, len(exact), every):
        rows = slice(first, first + every)
        cells = [f"{exact[rows].mean():.4f}"]
        for name in OTHERS:
            other = np.array(curves[name])[rows]
            gap = other - exact[rows]
            cells += [f"{other.mean():.4f}", f"{gap.mean():+.4f}", f"{np.abs(gap).max():.4f}"]
        table.add_row(f"{first + 1}-{min(first + every, len(exact))}", *cells)
    return table


def main() -> None:
    """Trains in every precision and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", nargs="?", default="configs/debug.yaml")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in (EXACT, *OTHERS):
            path = Path(folder) / precision
            curves[precision] = losses(
                arguments.config, path, precision, arguments.steps, arguments.overrides
            )
    Console(width=120).print(table_of(curves, max(arguments.steps // 10, 1)))


if __name__ == "__main__":
    main()
