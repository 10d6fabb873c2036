"""A quantised run trains like one rank however it is divided over two.

Where a weight lies close to the middle between two numbers of E2M1, or a key between two of E4M3,
topologies may round it to either, both rightly, and one such weight moves a loss by 1e-5. So there
must be none: see close_calls.py.
"""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from model import attention, qat
from model.kernels.fp8.kv import fake_quantise_kv
from model.kernels.mxfp4 import quantise, quantise_dequantise
from tests.trainer.parallel.topologies import (
    Job,
    Outcome,
    Topology,
    assert_trains_like,
    outcome,
    run_all,
    topology,
)

QAT = (
    "quantisation=mxfp4",
    "model.hidden_size=32",
    "model.moe_intermediate_size=64",
    "model.index_head_dim=32",
    "model.n_routed_experts=4",
    "steps=2",
    "seed=57",
)
MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])  # beyond 6 the scale doubles
ALONE = topology(1)
TWO = [
    topology(2),
    topology(2, tensor=2),
    topology(2, expert=2),
    topology(2, pipeline=2),
]
MORE_OF_TWO = [
    topology(2, context=2),
    topology(2, expert_tensor=2),
    topology(2, "parallel.recompute=[block]", pipeline=2, pipeline_schedule="zero_bubble_v"),
]


def gap(weights: Tensor) -> float:
    """How near any number comes to a middle, in units of its block's scale."""
    scales = quantise(weights).scales.float().repeat_interleave(32, -1)
    return float(((weights.abs() / scales)[..., None] - MIDDLES).abs().min())


def kv_gap(kv_NK: Tensor, rotary: int) -> float:
    """How near any number comes to a middle, in units of the largest of its key or entry.

    Without those below an eighth of it, which rounding changes by less than a hundredth of it.
    """
    numbers = kv_NK[:, :-rotary].abs()
    assert numbers.shape[1] <= 64, "one block"
    largest = numbers.amax(-1, keepdim=True)
    spacing = torch.exp2(torch.floor(torch.log2(numbers)) - 3)  # E4M3 has four significant bits
    distance = ((numbers / spacing) % 1 - 0.5).abs() * spacing / largest
    return float(distance[numbers * 8 >= largest].amin()) if len(kv_NK) else 1.0


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    run_dir = tmp_path_factory.mktemp("qat")
    gaps, kv_gaps = [], []

    def recorded_gaps(weights: Tensor) -> Tensor:
        gaps.append(gap(weights.detach()))
        return quantise_dequantise(weights)

    def recorded_kv_gaps(kv_NK: Tensor, rotary: int) -> Tensor:
        kv_gaps.append(kv_gap(kv_NK.detach(), rotary))
        return fake_quantise_kv(kv_NK, rotary)

    with (
        patch.object(qat, "quantise_dequantise", recorded_gaps),
        patch.object(attention, "fake_quantise_kv", recorded_kv_gaps),
    ):
        run_all(tiny, [Job(ALONE, run_dir)], *QAT)
    initial = 3 * (4 + 1)  # the initial weights are the same numbers at every topology
    assert len(gaps) == 4 * initial  # two steps, the look at every layer and the evaluation
    # Ten times what rounding moves in two steps. If not, take another seed.
    assert min(gaps[initial:]) > 1e-6 and min(kv_gaps) > 1e-6
    return outcome(run_dir)


@pytest.mark.parametrize(
    "spread",
    [*TWO, *(pytest.param(spread, marks=pytest.mark.slow) for spread in MORE_OF_TWO)],
    ids=lambda spread: spread.name,
)
def test_trains_like_one_rank(tiny: Path, alone: Outcome, tmp_path: Path, spread: Topology) -> None:
    run_all(tiny, [Job(spread, tmp_path)], *QAT)
    assert_trains_like(alone, outcome(tmp_path), spread.name)
