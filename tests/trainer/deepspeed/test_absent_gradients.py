"""DeepSpeed where rows leave parameters without a gradient on some ranks, or on all of them.

Such are compressors without a whole window, experts without a token, and the MTP block in samples
that are too short for it. One process trains natively, as the judge.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.distributed import spawn
from tests.trainer.tiny import column, saved_tensors, train

STEPS = ["steps=4", "evaluation.max_rows=4", "data.micro_batch_size=1", "optim.adamw.eps=1e-6"]
ADAMW = ["optim.matrix_optimizer=adamw"]
# The steps that DeepSpeed's Muon makes, from weights with which no choice is close.
MUON = ["seed=5", "optim.clip_norm=null", "optim.muon.coarse_steps=5", "optim.muon.fine_steps=0"]
ROWS = {
    # Of a rank's rows of 48 tokens some have a sample as long as a window, and others none.
    "windows on some ranks": [
        "model.csa_compress_ratio=40",
        "model.hca_compress_ratio=44",
        "model.n_routed_experts=32",
    ],
    # No entry anywhere, at most six tokens for 32 experts, and hardly a token two further.
    "rows of three tokens": [
        "data.seq_len=3",
        "model.hca_compress_ratio=44",
        "model.n_routed_experts=32",
    ],
}
RUNS = [("windows on some ranks", "AdamW", stage, "fp32") for stage in (0, 1, 3)]
RUNS += [("windows on some ranks", "AdamW", stage, "bf16") for stage in (1, 2)]
RUNS += [("windows on some ranks", "Muon", stage, "fp32") for stage in (1, 2, 3)]
RUNS += [("rows of three tokens", "AdamW", stage, "fp32") for stage in (0, 1, 2, 3)]
Run = tuple[str, str, int, str]


def overrides(rows: str, optimizer: str, precision: str) -> list[str]:
    of_optimizer = ADAMW if optimizer == "AdamW" else MUON
    return [*STEPS, *ROWS[rows], *of_optimizer, f"precision={precision}"]


def two_ranks(rank: int, world: int, path: Path, folder: Path, runs: list[Run]) -> None:
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # DeepSpeed compiles its Muon, which takes minutes
    for number, (rows, optimizer, stage, precision) in enumerate(runs):
        block = {"optimizer": {"type": optimizer}, "zero_optimization": {"stage": stage}}
        engine = ["engine=deepspeed", f"deepspeed={json.dumps(block)}"]
        train(path, folder / str(number), *overrides(rows, optimizer, precision), *engine)


def assert_as_alone(path: Path, folder: Path, runs: list[Run]) -> None:
    """Losses and weights of two ranks are those of one process without DeepSpeed."""
    spawn(two_ranks, 2, path, folder, runs, timeout=500)
    for number, run in enumerate(runs):
        rows, optimizer, _, precision = run
        alone = folder / f"alone {rows} {optimizer} {precision}"
        if not alone.exists():
            train(path, alone, *overrides(rows, optimizer, precision))
        ours, theirs = (column(name, "loss") for name in (folder / str(number), alone))
        # bf16: DeepSpeed rounds norms and streams' coefficients, which we keep in fp32.
        limit = 5e-3 if precision == "bf16" else 1e-5
        assert ours == pytest.approx(theirs, abs=limit), run
        if optimizer == "AdamW" and precision == "fp32":
            one, other = (
                saved_tensors(name / "checkpoints/step-00000004")
                for name in (folder / str(number), alone)
            )
            for key, tensor in other.items():
                torch.testing.assert_close(one[key], tensor, rtol=1e-4, atol=1e-5, msg=key)


def test_ranks_with_and_without_a_whole_window_reduce_the_same(tiny: Path, tmp_path: Path) -> None:
    assert_as_alone(tiny, tmp_path, [("windows on some ranks", "AdamW", 2, "fp32")])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_stage_and_optimizer_fills_absent_gradients(tiny: Path, tmp_path: Path) -> None:
    assert_as_alone(tiny, tmp_path, RUNS)
