"""A host with GPUs, as far as torch's numbers go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainer.kernels.fake_check import GPU
from trainer.kernels import first_check
from trainer.kernels.gpu import Platform


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> torch.device:
    """A host with two GPUs of a kind, as far as torch's numbers go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Platform, "of", classmethod(lambda cls, device: GPU))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(first_check, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(first_check, "missing_compiler", lambda: None)
    return torch.device("cuda", 0)
