"""A step on a GPU waits for the device once, where it reads its numbers; here: nowhere before."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data import Batch
from trainer.build import build_native
from trainer.config import load_config
from trainer.engine import NativeEngine
from trainer.parallel.grid import Grid

CONFIG = Path(__file__).parents[2] / "configs" / "debug.yaml"
WAYS = pytest.mark.parametrize(
    "overrides",
    [["precision=bf16"], ["precision=fp8"], ["precision=bf16", "kernels=compile"]],
    ids=lambda overrides: ", ".join(overrides),
)
LENGTHS = [[512], [200, 312], [1, 2, 509], [128] * 4]


def step_on(device: torch.device, *overrides: str) -> Callable[[], None]:
    """From rows on the host to new weights and router biases on the device."""
    config = load_config(CONFIG, overrides)
    grid = Grid.single(device)
    local, optimizer = build_native(config, grid)
    engine = NativeEngine(local, grid, optimizer)
    tokens = torch.randint(3, 4096, (4, 513), generator=torch.Generator().manual_seed(0))
    rows, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if device.type == "cuda":
        rows, targets = rows.pin_memory(), targets.pin_memory()
    batch = Batch(rows, targets, LENGTHS)

    def step() -> None:
        losses = engine.forward_backward([batch])
        engine.step(1e-6, engine.gradient_norm())
        local.model.update_router_bias(losses.expert_load)

    return step


@WAYS
def test_no_number_is_read_between_rows_and_update(overrides):
    """Without a GPU: the meta device's tensors have no numbers, so that reading one is an error."""
    step_on(torch.device("meta"), *overrides)()


@pytest.mark.gpu
@WAYS
def test_nothing_waits_for_the_device_between_rows_and_update(overrides):
    step = step_on(torch.device("cuda"), *overrides)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)]
    assert waits == []
