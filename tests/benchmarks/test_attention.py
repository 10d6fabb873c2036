"""The benchmark of attention where it cannot run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "attention.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    command = [sys.executable, str(SCRIPT)]
    run = subprocess.run(command, cwd=SCRIPT.parents[1], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.strip() == "This benchmark needs a GPU, and torch sees none."
