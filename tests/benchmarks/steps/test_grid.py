"""How many operators a step calls on a CPU: docs/performance.md has the number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.steps.grid import config_of, operators_of
from model import V4Model
from trainer.config import load_config

DEBUG = Path(__file__).parents[3] / "configs" / "debug.yaml"
PLAIN_TORCH = 27_289
"""Those of the same step before its loops were fused, ones that others call included."""


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="without MKL experts take turns")
def test_operators_of_a_step_of_512_tokens():
    model = V4Model(config_of(load_config(DEBUG).model, hidden=256, experts=16))
    model.init_weights(seed=1)
    tokens: Any = torch.randint(3, model.config.vocab_size, (1, 512))

    def step() -> None:
        model.zero_grad()
        model(tokens, targets=tokens).loss.backward()

    step()
    assert 1000 < operators_of(step) <= PLAIN_TORCH / 3
