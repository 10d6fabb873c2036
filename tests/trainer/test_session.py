"""What a run sets for its whole process."""

from __future__ import annotations

import pytest
import torch

from trainer import session


def test_deterministic_algorithms_fill_no_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's default takes a launch for every new tensor on a GPU."""
    modes: list[bool] = []
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.setattr(torch, "use_deterministic_algorithms", modes.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    session._use_deterministic_algorithms()
    assert modes == [True] and not torch.utils.deterministic.fill_uninitialized_memory
