"""Rows are copied while the device computes, and nothing reads or overwrites them too early."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data import Batch
from model import SampleLayout, TokenCounts
from trainer.build import build_native
from trainer.config import load_config
from trainer.engine import NativeEngine
from trainer.microbatches import RowCopies
from trainer.parallel.grid import Grid

CONFIG = Path(__file__).parents[2] / "configs" / "debug.yaml"
LENGTHS = [[[64]], [[20, 40]], [[1, 63]]]


def batches(pin: bool = False) -> list[Batch]:
    tokens = torch.randint(3, 4096, (3, 1, 65), generator=torch.Generator().manual_seed(0))
    rows, targets = tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous()
    if pin:
        rows, targets = rows.pin_memory(), targets.pin_memory()
    return [Batch(*three) for three in zip(rows, targets, LENGTHS, strict=True)]


class Streams:
    """A device's streams and events that write down who waits for what."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []
        self.now = "compute"

    def Stream(self) -> SimpleNamespace:
        wait = lambda other: self.events.append(("copies wait for", other))  # noqa: E731
        return SimpleNamespace(wait_stream=wait)

    def current_stream(self) -> str:
        return self.now

    @contextmanager
    def stream(self, stream: object):
        self.now = "copies"
        yield
        self.now = "compute"

    def Event(self) -> SimpleNamespace:
        number = sum(what[0] == "copied" for what in self.events)
        return SimpleNamespace(
            record=lambda: self.events.append(("copied", number, self.now)),
            wait=lambda: self.events.append((self.now, "waits for", number)),
        )


@pytest.mark.parametrize("backward", [True, False])
def test_a_microbatch_waits_for_its_own_rows_and_later_copies_for_all(monkeypatch, backward):
    streams = Streams()
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    config = load_config(CONFIG)
    grid = Grid.single(torch.device("cpu"))
    local, optimizer = build_native(config, grid)
    engine = NativeEngine(local, grid, optimizer)
    run = engine.model.run_blocks
    monkeypatch.setattr(
        engine.model, "run_blocks", lambda *a: (streams.events.append(("computes",)), run(*a))[1]
    )
    if backward:
        engine.forward_backward(batches())
    else:
        engine.evaluate(batches())
    work = [step for n in range(3) for step in (("compute", "waits for", n), ("computes",))]
    assert streams.events == [
        *(("copied", n, "copies") for n in range(3)),
        *work,
        ("copies wait for", "compute"),
    ]


def check(rows: list) -> None:
    for microbatch, batch in zip(rows, batches(), strict=True):
        microbatch.wait_for_copies()
        layout = SampleLayout.from_lengths(batch.lengths, 64)
        assert microbatch.counts == TokenCounts.of(layout, batch.targets)
        pairs = [(microbatch.tokens_BS, batch.tokens), (microbatch.targets_BS, batch.targets)]
        pairs += [
            (getattr(microbatch.layout, name), getattr(layout, name))
            for name in ("position_T", "start_T", "sample_T", "padding_T")
        ]
        for ratio in (4, 16):
            ours, right = microbatch.layout.entries(ratio), layout.entries(ratio)
            pairs += [(ours.start_T, right.start_T), (ours.end_T, right.end_T)]
        for ours, right in pairs:
            assert torch.equal(ours.cpu(), right)


def test_rows_and_counts_on_a_cpu():
    with RowCopies(torch.device("cpu"), [4, 16]).rows(batches()) as rows:
        check(rows)


@pytest.mark.gpu
def test_copies_pass_by_what_a_gpu_is_at():
    torch.cuda.init()
    copies = RowCopies(torch.device("cuda"), [4, 16])
    busy = torch.cuda.Event()
    torch.cuda._sleep(4_000_000_000)  # cycles: seconds
    busy.record()
    with copies.rows(batches(pin=True)) as rows:
        for actual in rows:
            actual.copied.synchronize()
        assert not busy.query()
        check(rows)
