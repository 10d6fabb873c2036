"""What the start of a run imports: little before its first line, and later only what it needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = "{'torch._dynamo', 'megatron', 'rich', 'deepspeed', 'wandb'}"


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", f"import sys; {code}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_first_line_comes_before_torch(tiny: Path, tmp_path: Path) -> None:
    code = "sys.modules['torch'] = None; from trainer.__main__ import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", f"import sys; {code}", str(tiny), f"run_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}: 6 steps on 1 process; loading torch\n"
    assert "ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize(
    ("user", "ours"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, "backend:cudaMallocAsync"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, None),
    ],
)
def test_segments_of_gpu_memory_grow_unless_the_user_chose(
    user: dict[str, str], ours: str | None, tiny: Path, tmp_path: Path
) -> None:
    code = """
import builtins, os, sys
from trainer.__main__ import main
original = builtins.__import__
def check(name, *arguments):
    if name == "torch":
        sys.exit(f"at the import of torch: {os.environ.get('PYTORCH_ALLOC_CONF')}")
    return original(name, *arguments)
builtins.__import__ = check
main(sys.argv[1:])
"""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", code, str(tiny), f"run_dir={tmp_path}"]
    done = subprocess.run(command, env=environment | user, capture_output=True, text=True)
    assert f"at the import of torch: {ours}" in done.stderr, done.stderr


def test_one_process_imports_nothing_that_it_does_not_need() -> None:
    modules = (
        "trainer.process.failures, trainer.preflight, trainer.trainer, trainer.planning.fit_device"
    )
    modules += ", trainer.planning.expected_memory, trainer.planning.out_of_memory"
    assert run(f"import {modules}; print({HEAVY} & set(sys.modules))") == "set()"
