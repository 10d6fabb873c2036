"""The kernels of processes that check nothing, from what the run has used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.kernels.operations import Choice, Kernels
from tests.trainer.kernels.test_agree import A100, H100
from trainer.config import load_config
from trainer.kernels import Platform, kernels_without_check
from trainer.kernels.pinned import pin


def test_without_a_check_triton_runs_only_where_the_run_has_used_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = "kernels={attention: triton, norms: triton, swiglu: compile}"
    config = load_config(tiny, [f"run_dir={tmp_path}", named])
    used = Choice("triton", {"rows": 32})
    pin(config.kernels, {H100.label: ("a", {"attention": used}, [])}).write(tmp_path)
    gpu, compiled = torch.device("cuda", 0), Choice("compile")
    platforms = {"cuda": H100}
    monkeypatch.setattr(
        Platform, "of", classmethod(lambda cls, device: platforms.get(device.type, cls("cpu")))
    )
    assert kernels_without_check(config, gpu) == Kernels(attention=used, swiglu=compiled)
    assert kernels_without_check(config, torch.device("cpu")) == Kernels(swiglu=compiled)
    platforms["cuda"] = A100
    assert kernels_without_check(config, gpu) == Kernels(swiglu=compiled)
