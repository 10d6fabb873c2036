"""Operations are checked in processes that may hang or die: the others get their verdicts."""

from __future__ import annotations

import sys
import time

from tests.model.tiny import tiny_config
from trainer.kernels.check import check_kernels
from trainer.kernels.verdict import Problem, Verdict

OPERATIONS = ("attention", "indexer", "indexer_loss", "compressor", "norms")


def test_without_a_gpu_the_reason_says_so():
    problem = Problem(tiny_config().model_dump(), "bfloat16", 64, ("norms",))
    (verdict,) = check_kernels(problem, 0, lambda operation: None)
    assert verdict == Verdict("norms", False, "torch can use no GPU on this host", "eager")


def test_a_hang_a_death_and_an_illegal_access_each_end_one_operation():
    problem = Problem(tiny_config().model_dump(), "bfloat16", 64, OPERATIONS, ((3, 4),))
    worker = (sys.executable, "-m", "tests.trainer.kernels.worker_stub")
    reported: list[str] = []
    before = time.monotonic()
    verdicts = check_kernels(problem, 3, reported.append, seconds=8.0, worker=worker)
    assert time.monotonic() - before < 120
    assert tuple(reported) == OPERATIONS
    hang, death, illegal, silent, fine = verdicts
    assert hang.reason == "its check took more than 8 seconds and was ended"
    assert hang.is_temporary and not death.is_temporary  # its limit was shorter than usual
    assert death.reason == "its check was killed by SIGSEGV (signal 11)"
    assert illegal.reason == (
        "its check failed: RuntimeError: CUDA error: an illegal memory access was encountered"
    )
    assert silent.reason.startswith("its check failed: ")
    for verdict in (hang, death, illegal, silent):
        assert not verdict.passed and verdict.choice == "eager"
    assert fine == Verdict("norms", True, "fine", "triton", {"block": 64}, {"eager": (0.1, 0.2)})
