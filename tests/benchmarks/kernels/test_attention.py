"""The benchmark of attention where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.kernels import attention_tasks
from tests.model.tiny import tiny_config

ROOT = Path(__file__).parents[3]


def test_without_a_gpu_it_reports_it():
    command = [sys.executable, "-m", "benchmarks.kernels.attention"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.strip() == "This benchmark needs a GPU, and torch sees none."


def test_the_indexer_s_loss_is_timed_over_all_entries_and_over_a_list(monkeypatch):
    monkeypatch.setattr(attention_tasks, "DEVICE", "cpu")
    config = tiny_config()
    for make, name in zip(
        attention_tasks.indexer_loss_tasks(config, 61), ("dense", "selected"), strict=True
    ):
        task = make()
        assert task.name == f"indexer loss, {name}" and task.forward.flops > 0
        leaves = [x.requires_grad_() for x in task.leaves]
        loss = task.implementations["eager"](*leaves)
        loss.sum().backward()
        assert float(loss.detach().sum()) > 0 and all(bool(x.grad.any()) for x in leaves)
