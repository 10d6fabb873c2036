"""The sizes of a run at which its kernels are checked."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.config import load_config
from trainer.kernels.examine import Bench, sizes_of
from trainer.kernels.problem import problem_of

CONFIGS = Path(__file__).parents[3] / "configs"
CPU = torch.device("cpu")


def test_samples_of_the_checked_microbatch_are_as_long_as_rows():
    """nano.yaml: four rows of 4096 tokens; the model itself reads up to a million."""
    problem = problem_of(load_config(CONFIGS / "nano.yaml"), CPU)
    bench = Bench(CPU, lambda call: [], lambda variants: None, lambda calls: [], 0)
    ragged, large = sizes_of(problem, bench)
    assert ragged.samples == (1, 2, 129, 1000, 3, 4, 70) and ragged.dense
    assert large.samples == (4096, 4096) and not large.dense
