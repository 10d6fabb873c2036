"""The device of a process: the config's `device`, this host's GPUs, GPUs that torch cannot use."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config import load_config
from trainer.parallel import grid
from trainer.process.errors import PreflightError
from trainer.process.local_device import Driver, _evidence_of_gpu, local_device, usable_gpus

OLD = Driver("/dev/nvidia0", "535.104.05", (12, 2))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without a GPU, whatever this one has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Driver, "of_host", lambda: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def with_architecture(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: list[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)


def with_gpus(monkeypatch: pytest.MonkeyPatch, number: int, processes: int, rank: int = 0) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    with_architecture(monkeypatch, (9, 0), ["sm_80", "sm_90"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_RANK", str(rank))


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, number=8, processes=8, rank=3)
    assert local_device("auto") == local_device("cuda") == torch.device("cuda", 3)
    assert local_device("cpu") == torch.device("cpu")
    assert (usable_gpus("auto"), usable_gpus("cpu")) == (8, 0)


def test_more_processes_than_gpus_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, number=1, processes=2, rank=0)  # on every rank, not only the second
    with pytest.raises(PreflightError, match=r"2 processes .* 1 GPU: .*--nproc-per-node 1, or"):
        local_device("auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    with pytest.raises(PreflightError, match=r"1 GPU \(CUDA_VISIBLE_DEVICES=5\)"):
        local_device("auto")


@pytest.mark.usefixtures("no_gpu")
def test_a_host_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_device("auto") == torch.device("cpu") and usable_gpus("auto") == 0
    with pytest.raises(PreflightError, match="device = cuda, and this host has no GPU"):
        local_device("cuda")


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_torch_cannot_use_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Driver, "of_host", lambda: OLD)
    for setting in ("auto", "cuda"):
        with pytest.raises(PreflightError, match="this host has an NVIDIA GPU"):
            local_device(setting)
    assert local_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the user hides it
    assert local_device("auto") == torch.device("cpu")
    with pytest.raises(PreflightError, match="CUDA_VISIBLE_DEVICES hides every GPU"):
        local_device("cuda")


@pytest.mark.parametrize(
    ("driver", "built", "parts"),
    [
        (OLD, "13.0", ["driver 535.104.05, CUDA 12.2 or older", "built for CUDA 13.0", "580"]),
        (OLD, "13.0", ["whl/cu126", "device=cpu"]),
        (Driver("/dev/nvidia0", None, (11, 4)), "12.6", ["driver 525 or newer, or set device=cpu"]),
        (OLD, "14.1", ["install a newer driver, or"]),
        (OLD, None, ["built without CUDA; install a build with CUDA, or set device=cpu"]),
        (Driver("/usr/bin/nvidia-smi", None, None), "13.0", ["(/usr/bin/nvidia-smi)", "state"]),
        (Driver("/dev/nvidia0", "580.65", (13, 0)), "13.0", ["state"]),
    ],
)
def test_the_sentence_has_both_versions_and_the_remedy(
    driver: Driver, built: str | None, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built)
    sentence = driver.problem()
    assert all(part in sentence for part in parts), sentence


def test_training_stops_before_it_takes_the_cpu_for_a_gpu(tiny: Path, tmp_path: Path) -> None:
    """`nvidia-smi` alone shows that the host has a GPU."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA A100 (UUID: GPU-1)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    run = [sys.executable, "-m", "launch", "train", str(tiny), f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    (line,) = (text for text in done.stderr.splitlines() if text.startswith("v4: error:"))
    assert f"this host has an NVIDIA GPU ({tmp_path}/nvidia-smi" in line
    assert not (tmp_path / "run").exists()
    done = subprocess.run([*run, "device=cpu", "steps=1"], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("program", "file", "has_gpu"),
    [
        (None, None, False),
        (None, "dev/nvidia0", True),
        (None, "proc/driver/nvidia/gpus/0000:01:00.0", True),
        (None, "dev/dxg", False),
        ("echo No devices found.", None, False),
        ("echo NVIDIA-SMI has failed; exit 9", None, False),
        ("echo 'GPU 0: NVIDIA A100 (UUID: GPU-1)'", None, True),
        ("exit 9", "dev/dxg", True),
    ],
)
def test_a_tool_without_a_gpu_is_no_gpu(
    program: str | None, file: str | None, has_gpu: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    """Images with NVIDIA's tools run on hosts that have no GPU as well."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin")
    (tmp_path / "bin").mkdir()
    if program is not None:
        (tmp_path / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    if file is not None:
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    assert (_evidence_of_gpu(tmp_path) is not None) == has_gpu


def test_nccl_knows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Exception):
        pass

    calls: list[Any] = []

    def record(*arguments: Any, **settings: Any) -> None:
        calls.append((arguments, settings.get("device_id")))
        raise Stopped

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(grid.dist, "init_process_group", record)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
    gpu = torch.device("cuda", 1)
    for device in (gpu, torch.device("cpu")):
        with pytest.raises(Stopped), grid.open_grid(device):
            pass
    assert calls == [gpu, (("cpu:gloo,cuda:nccl",), gpu), (("gloo",), None)]


def test_the_config_has_three_devices(tiny: Path) -> None:
    assert load_config(tiny).device == "auto"
    with pytest.raises(ValueError, match="device"):
        load_config(tiny, ["device=gpu"])


@pytest.mark.parametrize(
    ("capability", "built"),
    [
        ((7, 0), ["sm_75", "sm_80"]),
        ((12, 0), ["sm_90", "sm_100"]),
        ((9, 0), []),
        ((10, 3), ["sm_100a"]),
        ((8, 0), ["compute_90"]),
    ],
)
def test_a_gpu_that_torch_was_not_built_for(monkeypatch, capability, built) -> None:
    with_gpus(monkeypatch, number=1, processes=1)
    with_architecture(monkeypatch, capability, built)
    with pytest.raises(PreflightError) as caught:
        local_device("auto")
    message = str(caught.value)
    name = "sm_{}{}".format(*capability)
    assert message.startswith("Tesla V100 has compute capability {}.{}, and".format(*capability))
    assert f"is built for {', '.join(built) or 'no GPU'}; install" in message
    assert message.endswith(f"a build that has {name}, or set device=cpu to compute on the CPU")
    assert ("CUDA 12" in message) == (capability == (7, 0)) and "\n" not in message
    assert local_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "built"),
    [
        ((9, 0), ["sm_90"]),
        ((8, 9), ["sm_80"]),
        ((12, 0), ["sm_90", "compute_90"]),
        ((10, 3), ["sm_100f"]),
        ((10, 0), ["sm_100a"]),
    ],
)
def test_a_gpu_that_torch_was_built_for(monkeypatch, capability, built) -> None:
    with_gpus(monkeypatch, number=1, processes=1)
    with_architecture(monkeypatch, capability, built)
    assert local_device("cuda") == torch.device("cuda", 0)
