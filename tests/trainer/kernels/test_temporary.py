"""Failures that may be gone at the next start, and where Triton keeps what it compiled."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.model.tiny import tiny_config
from tests.trainer.kernels.test_examine import BENCH, first_triton, problem_of
from trainer.kernels.examine import check_operation
from trainer.kernels.fit import Variant
from trainer.kernels.temporary import advice_on, missing_compiler, use_writable_triton_cache
from trainer.kernels.verdict import Problem, Verdict
from trainer.kernels.worker import verdict_on_gpu

TEMPORARY = [
    (RuntimeError("Failed to find C compiler. Please specify via CC"), "install gcc"),
    (subprocess.CalledProcessError(1, ["gcc"]), "python3-dev"),
    (torch.OutOfMemoryError("CUDA out of memory."), "free the GPU's memory"),
    (RuntimeError("Could not create or locate cache dir"), "TRITON_CACHE_DIR"),
    (PermissionError(13, "Permission denied", "/home/x/.triton"), "make /home/x/.triton writable"),
]


@pytest.mark.parametrize(("error", "advice"), TEMPORARY)
def test_a_cause_outside_the_kernel_is_temporary_and_has_advice(
    error: Exception, advice: str, monkeypatch: pytest.MonkeyPatch
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
    verdict = verdict_on_gpu("norms", problem, 0)
    assert verdict.is_temporary and advice in verdict.reason


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
