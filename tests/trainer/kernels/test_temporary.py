"""Failures that may be gone at the next start, and where Triton keeps what it compiled."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.model.tiny import tiny_config
from tests.trainer.kernels.test_examine import BENCH, first_triton, problem_of
from trainer.kernels import fit
from trainer.kernels.examine import check_operation
from trainer.kernels.fit import Variant
from trainer.kernels.temporary import advice_on, missing_compiler, use_writable_triton_cache
from trainer.kernels.verdict import Problem, Verdict
from trainer.kernels.worker import verdict_on_gpu

TEMPORARY = [
    (RuntimeError("Failed to find C compiler. Please specify via CC"), "install gcc"),
    (subprocess.CalledProcessError(1, ["gcc"]), "python3-dev"),
    (torch.OutOfMemoryError("CUDA out of memory."), "free the GPU's memory"),
    (RuntimeError("CUDA error: out of memory\nCompile with"), "free the GPU's memory"),
    (RuntimeError("Triton Error [CUDA]: out of memory"), "free the GPU's memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "free the GPU's memory"),
    (RuntimeError("`ptxas` failed with error code -9"), "free memory of the host"),
    (RuntimeError("Could not create or locate cache dir"), "TRITON_CACHE_DIR"),
    (PermissionError(13, "Permission denied", "/home/x/.triton"), "make /home/x/.triton writable"),
]


@pytest.mark.parametrize(("error", "advice"), TEMPORARY)
def test_a_cause_outside_the_kernel_is_temporary_and_has_advice(
    error: Exception, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(call: object) -> list[Variant]:
        raise error

    bench = replace(BENCH, record=record)
    verdict = check_operation("norms", problem_of("norms"), bench, first_triton)
    assert verdict.is_temporary and not verdict.passed and advice in verdict.reason

    def fail(*arguments: object) -> Verdict:
        raise error

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("trainer.kernels.worker.gpu_bench", fail)
    problem = Problem(tiny_config().model_dump(), "bfloat16", 64, ("norms",))
    verdict = verdict_on_gpu("norms", problem, 0, tmp_path / "note", {})
    assert verdict.is_temporary and advice in verdict.reason


def test_a_folder_without_room_is_no_fault_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers write files: the error is raised, which ends the operation's check for now."""

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "/home/x/.triton")

    monkeypatch.setattr(fit, "compiled_for", fail)
    kernel = SimpleNamespace(fn=test_an_error_of_the_kernel_is_not)
    with pytest.raises(OSError, match="No space left"):
        fit.misfit([Variant(kernel, {}, {}, {}, {})], fit.DeviceLimits(90, 1))
    monkeypatch.setattr(fit.os, "cpu_count", lambda: 64)
    assert [fit._compilers(gib << 30) for gib in (1, 9, 100)] == [1, 4, 16]


def test_an_error_of_a_candidate_reaches_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU can no longer be used: the others need another process, which gets the reason."""
    note = tmp_path / "note"

    def die(*arguments: object) -> Verdict:
        note.write_text("0 runs")
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("trainer.kernels.worker.gpu_bench", die)
    problem = Problem(tiny_config().model_dump(), "bfloat16", 64, ("norms",))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        verdict_on_gpu("norms", problem, 0, note, {})


def test_an_error_of_the_kernel_is_not() -> None:
    assert advice_on(ValueError("head_dim is 16")) is None
    assert advice_on(RuntimeError("CUDA error: an illegal memory access")) is None


def test_what_triton_needs_of_a_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler, which the PATH or CC names, and Python's headers."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C compiler" in str(missing_compiler())
    for name, code in (("works", 0), ("fails", 1)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "works"))
    assert missing_compiler() is None
    for name in ("fails", "is not there"):
        monkeypatch.setenv("CC", str(tmp_path / name))
        assert f"{tmp_path / name} does not compile" in str(missing_compiler())


def test_triton_gets_a_folder_that_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # restored after the test
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    use_writable_triton_cache(tmp_path / "fallback")
    assert "TRITON_CACHE_DIR" not in os.environ
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_HOME", str(tmp_path / "file"))
    use_writable_triton_cache(tmp_path / "fallback")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "fallback")
