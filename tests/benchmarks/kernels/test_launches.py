"""How much the host launches in a step: docs/performance.md has the numbers."""

from __future__ import annotations

import pytest

from benchmarks.kernels.launches import ROOT, counted_on
from tests.fake_gpu import run
from tests.trainer.fake_gpu_run import needs_compiler


@needs_compiler
@pytest.mark.slow
def test_launches_of_a_microbatch_and_of_an_update() -> None:
    config = ROOT / "configs" / "nano.yaml"
    microbatch, update = run(counted_on, config, ["kernels=triton"])
    assert 700 < microbatch.launches.total() < microbatch.num_launches <= 3000
    assert 200 < update.launches.total() < update.num_launches <= 1000
