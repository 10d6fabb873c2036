"""Sweep files over the tiny run, and the command that runs them."""

import sys
from pathlib import Path

HEAD = """program: launch.trial
command: ["${{env}}", "${{interpreter}}", "-m", "${{program}}", {config}, "${{args_no_hyphens}}"]
metric: {{name: validation_loss}}
"""
GRID = "method: grid\nparameters:\n  optim.learning_rate: {values: [1e-3, 1e-2]}\n"


def write(tiny: Path, folder: Path, body: str) -> Path:
    """Writes a sweep file with this body."""
    path = folder / "sweep.yaml"
    path.write_text(HEAD.format(config=tiny) + body)
    return path


def command(file: Path, out: Path) -> list[str]:
    """The command that runs it, two trials at a time."""
    return [sys.executable, "-m", "launch", "sweep", str(file), f"--out={out}", "--jobs=2"]
