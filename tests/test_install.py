"""`make install` where torch finds a GPU and there is no CUDA toolkit.

DeepSpeed comes as a source archive. Its set-up probes the operators of the accelerator that it
finds, and on a host with a GPU and without `nvcc` that probe raises, although nothing is compiled.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCKED = re.compile(r"(torch|setuptools|wheel|numpy|ninja|deepspeed)==")

# Python imports this before anything else. A CPU build of torch then reports what a GPU build does.
SITECUSTOMIZE = """
import torch
import torch.utils.cpp_extension

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_properties = lambda device=None: type("H100", (), {"major": 9, "minor": 0})
torch.cuda.is_bf16_supported = lambda including_emulation=True: True
torch.cuda.nccl.version = lambda: (2, 29, 7)
torch.version.cuda = "13.0"
torch.utils.cpp_extension.CUDA_HOME = None
"""


def packages_without_deepspeed(folder: Path) -> Path:
    """Links all installed packages but DeepSpeed into `folder`, so that pip has to build it."""
    folder.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not re.match(r"deepspeed|__editable__|v4_pretrain", entry.name):
            (folder / entry.name).symlink_to(entry)
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_gpu_host_without_a_cuda_toolkit_can_install(tmp_path: Path) -> None:
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    lines = [line for line in lock if LOCKED.match(line)]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    source = [line for line in lines if line.startswith("deepspeed")]
    download = subprocess.run([*pip, "--dest", tmp_path, *source], capture_output=True, text=True)
    if download.returncode and not os.environ.get("CI"):
        pytest.skip(f"no source archive of DeepSpeed: {download.stderr[-200:]}")
    assert not download.returncode, download.stderr

    project = tmp_path / "project"
    project.mkdir()
    (project / "requirements.lock").write_text("\n".join(lines) + "\n")
    for name in ("Makefile", "setup.py"):
        shutil.copy(ROOT / name, project)
    # MAKE* of an outer make, and a choice of accelerator by the user, are not part of the test.
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "DS_", "CUDA"))
    }
    env |= {
        "PYTHONPATH": str(packages_without_deepspeed(tmp_path / "packages")),
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_NO_CACHE_DIR": "1",  # a wheel from an earlier build would hide the set-up
    }
    make = ["make", "install", f"PYTHON={sys.executable}"]
    install = subprocess.run(make, cwd=project, env=env, capture_output=True, text=True)
    assert not install.returncode, install.stdout + install.stderr

    python = project / ".venv/bin/python"
    program = "import deepspeed; print(deepspeed.__file__)"
    place = subprocess.run([python, "-c", program], env=env, capture_output=True, text=True)
    assert str(project) in place.stdout, place.stdout + place.stderr
