"""The learning rate at the corners of its curve."""

from itertools import pairwise

import pytest

from optim.config import OptimConfig
from optim.schedule import decay_start, learning_rate_at


def config(**shape: float) -> OptimConfig:
    return OptimConfig(learning_rate=2.0, schedule=shape)


def test_corners() -> None:
    settings = config(warmup_steps=10, decay_start=60, final_ratio=0.1)
    rates = [learning_rate_at(settings, step, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10:60] == [2.0] * 50
    assert rates[79] == pytest.approx(1.1)  # the middle of the cosine
    assert rates[99] == pytest.approx(0.2) and rates[100] == pytest.approx(0.2)
    assert all(late < early for early, late in pairwise(rates[59:100]))


def test_decay_by_fraction_and_by_default() -> None:
    by_fraction = config(warmup_steps=0, decay_fraction=0.25)
    assert decay_start(by_fraction, 40) == 30
    assert decay_start(config(warmup_steps=0), 40) == 36


def test_no_decay_at_all() -> None:
    assert learning_rate_at(config(warmup_steps=0, decay_fraction=0.0), 39, 40) == 2.0


def test_a_run_inside_its_warmup_only_warms_up() -> None:
    rates = [learning_rate_at(config(warmup_steps=100), step, 10) for step in range(10)]
    assert rates == pytest.approx([0.02 * (step + 1) for step in range(10)])
    assert decay_start(config(warmup_steps=100), 10) > 9


def test_a_decay_beyond_the_end_never_starts() -> None:
    assert learning_rate_at(config(warmup_steps=0, decay_start=50), 39, 40) == 2.0
