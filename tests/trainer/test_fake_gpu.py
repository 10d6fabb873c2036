"""The real Trainer on a fake GPU (tests/fake_gpu): one process, every mode.

A step waits for the device once, where its numbers are read; nothing else may wait, block, mix
devices, or ask NCCL or a launch for what these refuse.
"""

from __future__ import annotations

import pytest

from tests.trainer.fake_gpu_run import faults, needs_compiler, train_on_fake_gpu

pytestmark = needs_compiler
PHASES = (
    "steps=0",
    "phases=[{until_tokens: 96, attention: dense}, {until_tokens: 192, attention: warmup}, "
    "{until_tokens: 384, attention: sparse}]",
    "optim.schedule.decay_fraction=0.3",
)


def test_eager(tiny, tmp_path):
    parts = train_on_fake_gpu(tiny, tmp_path, "kernels=eager", "model.hc_sinkhorn_iters=2")
    assert faults(parts) == {}
    assert not parts.steps[0].launches


def test_with_all_kernels(tiny, tmp_path):
    parts = train_on_fake_gpu(tiny, tmp_path)
    assert faults(parts) == {}
    kernels = {name.split(".")[2] for name in parts.steps[0].launches if name.startswith("model")}
    assert kernels >= {"attention", "compressor", "cross_entropy", "indexer", "norm", "swiglu"}


MODES = {
    "dense, warm-up and sparse phases": PHASES,
    "FP8": ("precision=fp8",),
    "MXFP4": ("quantisation=mxfp4", "model.hidden_size=32", "model.index_head_dim=32"),
    "anticipation": ("stability.anticipatory_routing={when: always, lag_steps: 1}",),
    "offload": ("parallel.recompute=[block]", "parallel.offload=[block]"),
    "recomputed parts": ("parallel.recompute=[streams, norms, attention]",),
}


@pytest.mark.parametrize(
    "mode", [pytest.param(m, marks=() if "phases" in m else pytest.mark.slow) for m in MODES]
)
def test_modes(mode, tiny, tmp_path):
    parts = train_on_fake_gpu(tiny, tmp_path, *MODES[mode], saves=mode == "anticipation")
    assert faults(parts) == {}
