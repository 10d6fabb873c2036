"""The real Trainer on a fake GPU (tests/fake_gpu): one process, every mode.

A step waits for the device once, where its numbers are read; nothing else may wait, block, mix
devices, or ask NCCL or a launch for what these refuse.
"""

from __future__ import annotations

import pytest

from tests.fake_gpu import run
from tests.trainer.fake_gpu_run import (
    ANTICIPATION,
    OFFLOAD,
    faults,
    needs_compiler,
    phases,
    train_on_fake_gpu,
    variants,
)

pytestmark = needs_compiler


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
    "dense, warm-up and sparse phases": phases(96),
    "FP8": ("precision=fp8",),
    "MXFP4": ("quantisation=mxfp4", "model.hidden_size=32", "model.index_head_dim=32"),
    "anticipation": ANTICIPATION,
    "offload": OFFLOAD,
    "recomputed parts": ("parallel.recompute=[streams, norms, attention]",),
}


@pytest.mark.parametrize(
    "mode", [pytest.param(m, marks=() if "phases" in m else pytest.mark.slow) for m in MODES]
)
def test_modes(mode, tiny, tmp_path):
    parts = train_on_fake_gpu(tiny, tmp_path, *MODES[mode], saves=mode == "anticipation")
    assert faults(parts) == {}


@pytest.mark.slow
def test_a_hundred_packings_compile_what_few_do(tiny):
    """Kernels are compiled by sizes of the model, not by lengths and numbers of samples."""
    overrides = ("data.seq_len=96", "model.num_nextn_predict_layers=0")
    counts = run(variants, tiny, 100, overrides)
    assert counts[-1] == counts[9] > 20, counts
