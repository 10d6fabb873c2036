"""Garbage is collected by the loop, after the same steps on all ranks."""

import gc
import weakref
from pathlib import Path
from typing import Any

import torch

from tests.trainer.tiny import train
from trainer import garbage
from trainer.garbage import EVERY_STEPS, collection_by_steps


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_cycles_live_until_a_step_is_due() -> None:
    before = gc.get_freeze_count()
    with collection_by_steps() as collect:
        assert not gc.isenabled()
        alive = weakref.ref(Cycle())
        collect(EVERY_STEPS - 1)
        assert alive() is not None
        collect(EVERY_STEPS)
        assert alive() is None
    assert gc.isenabled() and gc.get_freeze_count() == before


def test_steps_leave_no_tensor_in_a_cycle(tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Which would take memory until a collection."""
    leaked: list[Any] = []

    def count(step: int) -> None:
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        if 2 < step < 6:  # without what the first steps make, and the last saves and collects
            leaked.extend(x for x in gc.garbage if issubclass(type(x), torch.Tensor))
        gc.garbage.clear()

    monkeypatch.setattr(garbage, "_collect_after", count)
    train(tiny, tmp_path / "run")
    assert not leaked, [tensor.shape for tensor in leaked]
