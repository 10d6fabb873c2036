"""Prefetched batches are the loader's own, made before they are asked for."""

import threading
import time

import pytest
import torch

from data.errors import DataError
from data.rows.loader import Batch
from data.rows.prefetch import Prefetcher


class Steps:
    """A loader's `at` that notes who asks for what, and fails at step 5."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.threads: set[int] = set()

    def at(self, step: int) -> list[Batch]:
        if step == 5:
            raise DataError("step 5 cannot be read")
        self.made.append(step)
        self.threads.add(threading.get_ident())
        return [Batch(torch.tensor([[step]]), torch.tensor([[-step]]), [[1]])]


def wait_for(made: list[int], count: int) -> None:
    deadline = time.monotonic() + 20
    while len(made) < count and time.monotonic() < deadline:
        time.sleep(0.001)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_any_order_of_steps_gives_each_its_own_batches(ahead: int) -> None:
    source = Steps()
    batches = Prefetcher(source.at, ahead, steps=100)
    for step in (0, 1, 2, 40, 41, 3, 99, 7):
        (batch,) = batches.at(step)
        assert batch.tokens.item() == step and batch.targets.item() == -step
    batches.close()


def test_later_steps_are_made_meanwhile_and_none_after_the_last() -> None:
    source = Steps()
    batches = Prefetcher(source.at, 3, steps=3)
    batches.at(0)
    wait_for(source.made, 3)
    assert source.made == [0, 1, 2]
    assert source.threads.isdisjoint({threading.get_ident()}) and len(source.threads) == 1
    batches.at(1)
    batches.at(2)
    batches.close()
    assert source.made == [0, 1, 2], "nothing twice, and nothing after the last step"


def test_an_error_comes_at_its_own_step() -> None:
    batches = Prefetcher(Steps().at, 2, steps=100)
    assert batches.at(4)[0].tokens.item() == 4  # 5 has failed or will, unseen
    with pytest.raises(DataError, match="step 5 cannot be read"):
        batches.at(5)
    assert batches.at(6)[0].tokens.item() == 6
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_tensors_are_pinned_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU nothing can be, so the tensor's own method is stood in for."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1000)
    for pin, more in ((False, 0), (True, 1000)):
        batches = Prefetcher(Steps().at, 1, steps=2, pin=pin)
        (batch,) = batches.at(1)
        assert (batch.tokens.item(), batch.targets.item()) == (1 + more, -1 + more)
        batches.close()
