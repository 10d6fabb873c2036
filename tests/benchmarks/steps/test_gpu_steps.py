"""The benchmarks of whole steps, tried on a CPU, and their message without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.steps import machine, step_gpu, train_gpu
from model.execution import Execution
from model.kernels.operations import Choice, Kernels
from tests.trainer.tiny import TINY

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def twice(call: Callable[[], object], device: torch.device) -> float:
        start = time.perf_counter()
        call(), call()
        return (time.perf_counter() - start) / 2

    for module in (step_gpu, train_gpu):
        monkeypatch.setattr(module, "seconds", twice)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(folder=tmp_path))
    return path


@pytest.mark.parametrize("name", ["step_gpu", pytest.param("train_gpu", marks=pytest.mark.slow)])
def test_without_a_gpu_they_report_it(name: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.steps.{name}"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith(
        "This benchmark needs a GPU, and torch sees none; try it with --device cpu"
    )


def test_a_step_part_by_part(config: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    command = ["step_gpu", "--device=cpu", f"--config={config}", "--row=64", "--rows=2"]
    monkeypatch.setattr(sys, "argv", command)
    assert step_gpu.main() == 0
    output = capsys.readouterr().out
    for part in ("embedding", "hyper-connections", "experts", "heads and losses", "optimizer"):
        assert part in output
    for kind in ("window", "csa", "hca"):
        assert f"attention, {kind}" in output
    assert "rows to the device" in output and "operators of a step take" in output


@pytest.mark.parametrize("what", ["parts of a step", "ours, step", "ours"])
def test_they_time_the_kernels_that_a_run_would_use(
    what: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the choice is eager, for a reason that only a run's own choice has."""
    built: list[Kernels] = []

    class Built(Exception):
        """Ends the benchmark where it has its kernels."""

    def build_native(*args: Any, kernels: Kernels) -> None:
        built.append(kernels)
        raise Built

    def model(config: Any, dtype: torch.dtype, execution: Execution) -> None:
        build_native(kernels=execution.kernels)

    monkeypatch.setattr(machine, "build_native", build_native)
    monkeypatch.setattr(train_gpu, "V4Model", model)
    monkeypatch.setattr(sys, "argv", ["step_gpu", "--device=cpu", f"--config={config}"])
    run = machine.config_of(str(config), CPU, 64)
    calls = {
        "parts of a step": step_gpu.main,
        "ours, step": lambda: train_gpu.step_time(run, CPU),
        "ours": lambda: train_gpu.our_calls(run, CPU),
    }
    with pytest.raises(Built):
        calls[what]()
    assert built[0].norms == Choice(why="on cpu")


def test_an_update_is_the_same_work_every_time(config: Path, monkeypatch) -> None:
    from optim import optimizer

    directions: list[torch.Tensor] = []
    original = optimizer.orthogonal_update
    monkeypatch.setattr(
        optimizer,
        "orthogonal_update",
        lambda d, *more: (directions.append(d.clone()), original(d, *more))[1],
    )
    step = machine.Step(machine.config_of(str(config), CPU, 64), CPU, Kernels())
    step.forward_backward()
    gradients = [gradient.clone() for gradient in step.gradients]
    step.update()
    first = len(directions)
    step.update()
    moved = [bool(direction.any()) for direction in directions]  # indexers have no gradient here
    assert any(moved) and moved[:first] == moved[first:]
    for before, after in zip(gradients, step.gradients, strict=True):
        assert torch.equal(before, after)


@pytest.mark.slow
def test_steps_compared_with_transformers(config: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(train_gpu, "MICROBATCH_TOKENS", 128)
    path = tmp_path / "train.json"
    command = ["train_gpu", "--device=cpu", f"--configs={config}", "--rows=64", f"--json={path}"]
    monkeypatch.setattr(sys, "argv", command)
    assert train_gpu.main() == 0
    results = json.loads(path.read_text())["results"]
    lines = {result["what"]: result for result in results}
    assert set(lines) == {
        "ours, step",
        "ours",
        "ours, step in FP8",
        *(f"transformers, {experts}" for experts in train_gpu.EXPERTS),
    }
    for line in lines.values():
        assert line["note"] == "" and line["tokens_per_second"] > 0 and line["mfu"] > 0


def test_the_time_of_a_row_includes_its_share_of_the_update(config: Path, monkeypatch) -> None:
    """1 s for the passes of four rows, 2 s for the update of 8,192 rows of 64 tokens."""
    times = iter([1.0, 2.0])
    monkeypatch.setattr(train_gpu, "seconds", lambda call, device: next(times))
    four = machine.config_of(str(config), CPU, 64, 4)
    assert train_gpu.step_time(four, CPU) == 1 / 4 + 2 / 8192
