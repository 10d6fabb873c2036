"""Losses of bf16 beside fp32 over the same steps on the same rows, from the same weights.

Trains a config twice, in folders of its own, and compares the losses of all steps. Overrides make
its rows or batches smaller.

    python -m benchmarks.precision [CONFIG] [--steps 200] [key=value ...]
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

PRECISIONS = ("fp32", "bf16")


def losses(
    config: str, folder: Path, precision: str, steps: int, overrides: list[str]
) -> list[float]:
    """The language-model loss of every step of a run in `precision`."""
    command = [sys.executable, "-m", "trainer", config, f"run_dir={folder}", f"steps={steps}"]
    command += [f"precision={precision}", "metrics.wandb.mode=disabled", "evaluation.every=0"]
    command += ["checkpoint.every=0", "metrics.every=1", *overrides]
    subprocess.run(command, check=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [record["lm_loss"] for record in found if "lm_loss" in record]


def table_of(curves: dict[str, list[float]], every: int) -> Table:
    """Means of so many steps: fp32's loss, bf16's, and their difference."""
    table = Table(title="loss, nats, means of steps")
    for heading in ("steps", *PRECISIONS, "difference", "largest of a step"):
        table.add_column(heading, justify="right")
    exact, other = (np.array(curves[name]) for name in PRECISIONS)
    for first in range(0, len(exact), every):
        rows = slice(first, first + every)
        gap = other[rows] - exact[rows]
        table.add_row(
            f"{first + 1}-{min(first + every, len(exact))}",
            f"{exact[rows].mean():.4f}",
            f"{other[rows].mean():.4f}",
            f"{gap.mean():+.4f}",
            f"{np.abs(gap).max():.4f}",
        )
    return table


def main() -> None:
    """Train twice and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", nargs="?", default="configs/debug.yaml")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            path = Path(folder) / precision
            curves[precision] = losses(
                arguments.config, path, precision, arguments.steps, arguments.overrides
            )
    Console(width=100).print(table_of(curves, max(arguments.steps // 10, 1)))


if __name__ == "__main__":
    main()
