"""The memory lines of a run at its start and its end, compared with its tensors."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest
import torch

from data import Loader
from tests.distributed import spawn
from trainer.__main__ import main
from trainer.build import build_native
from trainer.config import RunConfig, load_config
from trainer.device import peak_memory, peak_memory_report
from trainer.engine import NativeEngine
from trainer.parallel.grid import Grid
from trainer.planning import expected_memory
from trainer.planning.activations import Live, Storages
from trainer.planning.dry_run import count_memory
from trainer.planning.expected_memory import (
    expected_memory_report,
    host_memory_warning,
    rough_activations,
)
from trainer.planning.static_memory import memory_parts

# Weights of 1 MiB and more, so that what is printed has digits enough.
WIDE = ("model.hidden_size=128", "model.moe_intermediate_size=256", "precision=bf16")
SIZE = {"MiB": 2**20, "GiB": 2**30}


def said(text: str, name: str) -> float:
    """The bytes after a name, to a tenth of a MiB or a hundredth of a GiB."""
    match = re.search(rf"{name} ([\d.,]+) (MiB|GiB)", text)
    assert match is not None, (name, text)
    return float(match[1].replace(",", "")) * SIZE[match[2]]


def test_a_run_logs_expected_and_peak_memory(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*WIDE, f"run_dir={tmp_path}", "steps=3", "evaluation.every=2"]
    assert main([str(tiny), *overrides]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("step "))
    (expects,) = (line for line in lines[:first] if " expected throughout the run " in line)
    config = load_config(tiny, overrides)
    local, optimizer = build_native(config, Grid.single())
    engine = NativeEngine(local, Grid.single(), optimizer)
    batches = Loader(config.data, config.seed, 0, 1).at(0)
    engine.forward_backward(batches)
    model, near = local.model, {"abs": 0.06 * 2**20}
    weights = [*model.parameters(), *model.buffers()]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    tensors_by_part = {
        "weights": weights,
        "gradients": grads,
        # fp32 parameters are their own masters.
        "master weights": [t for t in optimizer.owned() if t not in Storages(weights)],
        "optimizer states": [s.tensor for s in optimizer.states() if s.kind != "master"],
    }
    for name, tensors in tensors_by_part.items():
        assert said(expects, name) == pytest.approx(sum(t.nbytes for t in tensors), **near), name
    with Live(Storages([*weights, *grads])) as live:
        engine.forward_backward(batches)
    total = sum(said(expects, name) for name in tensors_by_part)
    assert said(expects, "memory:") == pytest.approx(total, abs=0.5 * 2**20)
    counted = count_memory(config, 1).fullest
    passes = counted.microbatches + counted.activations + counted.workspace
    assert passes == pytest.approx(live.peak, rel=0.1)  # routing is uneven, samples are short
    # After the first evaluation, and at the end.
    places = [place for place, line in enumerate(lines) if "memory: peak " in line]
    steps = [int(line.split()[1].split("/")[0]) for line in lines if line.startswith("step ")]
    assert steps == [1, 2, 3] and len(places) == 2
    assert lines[places[0] - 1].startswith("step 2/3") and lines[places[1] - 1].startswith(
        "step 3/3"
    )
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert "(rank 0), resident, Python and libraries included" in lines[places[1]]
    digit = 2**20 if own < 2**30 else 2**30 / 100
    assert 100 * 2**20 < said(lines[places[1]], "memory: peak") <= own + digit


def of_ranks(rank: int, world: int, path: Path) -> tuple[str, int]:
    """Worker: the line about the peak, and this rank's own peak."""
    grid = Grid.build(load_config(path).degrees(world), torch.device("cpu"))
    filled = torch.ones(rank * 2**25)  # 128 MiB on the second rank
    assert filled.numel() == rank * 2**25
    return peak_memory_report(grid), peak_memory(grid.device)


def test_the_peak_is_that_of_the_fullest_rank(tiny: Path) -> None:
    everyone = spawn(of_ranks, 2, tiny)
    (line,) = {line for line, _ in everyone}
    assert "(rank 1)" in line
    most = max(peak for _, peak in everyone)
    assert said(line, "memory: peak") == pytest.approx(most, abs=2**24)


def test_another_engine_has_no_estimate(tiny: Path) -> None:
    config = load_config(tiny).model_copy(update={"engine": "deepspeed"})
    assert "no estimate" in expected_memory_report(config, 1)


def test_a_run_that_the_host_cannot_hold_is_a_warning(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny)
    needed = count_memory(config, 1).fullest.total
    counts: list[int] = []

    def count(config: RunConfig, world: int) -> object:
        counts.append(world)
        return count_memory(config, world)

    monkeypatch.setattr(expected_memory, "count_memory", count)
    for available, counted, warns in ((2**40, 0, False), (needed + 1, 1, False), (needed, 2, True)):
        monkeypatch.setattr(expected_memory, "available_memory", lambda device, a=available: a)
        warning = host_memory_warning(config, torch.device("cpu"))
        assert (warning is not None, len(counts)) == (warns, counted)
    assert warning is not None and "data.micro_batch_size (now 2)" in warning


@pytest.mark.parametrize(
    "overrides",
    [[], ["data.seq_len=512"], ["data.micro_batch_size=400", "data.global_batch_size=400"]],
)
def test_the_rough_estimate_is_not_below_the_count(tiny: Path, overrides: list[str]) -> None:
    """Twice the estimate decides whether activations are counted."""
    config = load_config(tiny, overrides)
    lasting = sum(memory_parts(config, config.degrees(1)).values())
    activations = count_memory(config, 1).fullest.total - lasting
    assert 0.5 < activations / rough_activations(config) < 1.5
