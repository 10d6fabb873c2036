"""Operations are checked in processes that may hang or die: the others get their verdicts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

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


def test_a_candidate_that_crashes_or_hangs_leaves_the_others():
    problem = Problem(tiny_config().model_dump(), "bfloat16", 64, ("swiglu", "permute"))
    worker = (sys.executable, "-m", "tests.trainer.kernels.worker_stub")
    swiglu, permute = check_kernels(problem, 3, print, stall_seconds=1.0, worker=worker)
    assert swiglu.passed and swiglu.refused == {
        "1": "its check was killed by SIGSEGV (signal 11)",
        "2": "it took more than 1 seconds and was ended",
    }
    # Nothing but the host's memory, or a person, ends a process by SIGKILL.
    assert permute.is_temporary and not permute.passed
    advice = "; free memory of the host, or raise the limit of its job or pod"
    assert permute.reason == "its check was killed by SIGKILL" + advice


HANGS = """
import os, time
from pathlib import Path
from trainer.kernels import worker

def hang(*arguments):
    Path(os.environ["PID_FILE"]).write_text(str(os.getpid()))
    time.sleep(600)

worker.verdict_on_gpu = hang
worker.main()
"""
CALLS = """
import sys
from tests.model.tiny import tiny_config
from trainer.kernels.check import check_kernels
from trainer.kernels.verdict import Problem

problem = Problem(tiny_config().model_dump(), "bfloat16", 64, ("norms",))
check_kernels(problem, 0, print, worker=(sys.executable, "-c", sys.argv[1]))
"""


def test_a_worker_that_hangs_ends_with_a_parent_that_is_killed(tmp_path: Path):
    file = tmp_path / "pid"
    environment = os.environ | {"PID_FILE": str(file)}
    parent = subprocess.Popen([sys.executable, "-c", CALLS, HANGS], env=environment)
    try:
        wait_for(lambda: file.exists() and file.read_text() != "")
    finally:
        parent.kill()
        parent.wait()
    worker = int(file.read_text())
    try:
        wait_for(lambda: not is_running(worker), seconds=10)
    finally:
        if is_running(worker):
            os.kill(worker, signal.SIGKILL)


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
