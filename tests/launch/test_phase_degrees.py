"""`v4 train` on two processes through a border of two phases with other degrees."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.config.test_recipe import phased
from tests.trainer.tiny import steps_in_file

PHASES = [
    {"until_tokens": 400, "attention": "dense", "parallel": {"tensor": 2}},
    {"until_tokens": 800, "attention": "dense", "parallel": {"context": 2}},
]


@pytest.mark.slow
def test_the_launcher_starts_the_processes_again(tiny: Path, tmp_path: Path) -> None:
    """Without a restart to spend, and without a line that looks like a failure."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "launch", "train", str(phased(tiny, tmp_path, PHASES))]
    command += [f"run_dir={run_dir}", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    steps = steps_in_file(run_dir)
    assert steps == list(range(1, len(steps) + 1))
    assert done.stdout.count("the processes start again") == 1
    assert done.stdout.count("tensor 1 x context 2 x data 1 x pipeline 1") == 1
    assert done.stdout.count("resumed from") == 1
    for word in ("failed", "exitcode", "SIGTERM", "Traceback"):
        assert word not in done.stderr, done.stderr
