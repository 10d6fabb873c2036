"""The stages of few documents as those of many."""

import pytest

import data.prepare.dedup.sequence


@pytest.fixture(autouse=True)
def stage_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares out all tasks, however small."""
    monkeypatch.setattr(data.prepare.dedup.sequence, "_TOGETHER", -1)
