"""`v4 kernels check` without a GPU, `v4 kernels show`, and where a run's kernels end up."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch

from model.kernels.operations import Choice, Kernels
from tests.trainer.kernels.test_verdict_file import KEY, VERDICTS
from trainer.build import build_native
from trainer.commands import main
from trainer.config import RunConfig, load_config
from trainer.device import DeviceInfo
from trainer.kernels.verdict_file import cache_folder, write_verdicts
from trainer.parallel.grid import Grid
from trainer.planning.fit_device import Count


def test_a_check_without_a_gpu_is_one_sentence(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernels-check", str(tiny), "device=cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.endswith(
        "kernels are checked on a GPU, and this run's device is the CPU, where every operation "
        "runs eagerly\n"
    )


@pytest.mark.parametrize(("options", "processes"), [([], 2), (["--processes=64"], 64)])
def test_a_check_is_of_the_sizes_that_fit_the_runs_processes(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], processes: int
) -> None:
    """With fit_to_memory, microbatches depend on how many processes there are."""
    asked: list[int] = []

    def fit(
        config: RunConfig, world: int, device: DeviceInfo, count: Count
    ) -> tuple[RunConfig, str]:
        asked.extend([world, count.world])
        return config, "fit_to_memory: as it is"

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr("trainer.process.local_device.local_device", lambda setting: gpu)
    monkeypatch.setattr(DeviceInfo, "of", classmethod(lambda cls, device: cls("GPU", 1)))
    monkeypatch.setattr("trainer.planning.fit_device.fit", fit)
    monkeypatch.setattr("trainer.kernels.commands.check_command", lambda config: iter(()))
    settings = ["parallel.tensor=2", "fit_to_memory=true"]
    assert main(["kernels-check", str(tiny), *settings, *options]) == 0
    assert asked == [processes, processes]


def test_show_prints_all_verdicts_of_the_cache_and_why_a_kernel_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["kernels-show"]) == 2
    assert f"{cache_folder()} has no verdicts; v4 kernels check" in capsys.readouterr().err
    model = {"hidden_size": 64, "head_dim": 16}
    key = dataclasses.replace(KEY, problem=dataclasses.replace(KEY.problem, model=model))
    write_verdicts(cache_folder(), key, VERDICTS)
    (cache_folder() / "damaged.json").write_text("{")
    assert main(["kernels-show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("NVIDIA H100 80GB HBM3, driver 580.65, torch 2.13.0, triton 3.7.1")
    (norms,) = [line for line in lines if "norms" in line]
    for cell in ("1.0e-03, -", "1.0e-03, 2.0e-03", "0.11 ms", "0.2 ms", "triton (rows 4)"):
        assert cell in norms
    assert lines[-1] == (
        "attention: its Triton kernel is not used on this GPU: needs too much shared memory"
    )


def test_a_runs_kernels_reach_its_model_and_its_optimizer(tiny: Path) -> None:
    from optim import syrk_triton

    config = load_config(tiny)
    kernels = Kernels(norms=Choice("triton"), syrk=Choice("triton", {"block": 64}))
    local, optimizer = build_native(config, Grid.single(torch.device("cpu")), kernels=kernels)
    assert local.model.execution.kernels == kernels
    assert local.model.layers[0].attn_norm.choice == Choice("triton")
    syrk = optimizer.inner.syrk
    assert isinstance(syrk, partial) and syrk.func is syrk_triton.syrk_
    assert syrk.keywords == {"block": 64}
