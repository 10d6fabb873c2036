"""How long steps stop for a checkpoint: beside training and while they wait, in one run.

    python -m benchmarks.checkpoint.pause FOLDER [--saves 3] [--every 4] [key=value ...]

Trains a model of 200 million parameters with Muon in fp32, whose weights and states are 1.7 GB, on
one process; the rows are short, since what is measured is the save. Every `--every` steps a
checkpoint is saved, in turn with checkpoint.mode async and sync. A pause is the time for which the
call that saves holds up the loop; the excess of the whole step over the median of steps without a
save is reported as well, but other programs disturb it more. The floor is the time that this host
takes to copy as many bytes once, measured with the same number of threads. Needs 6 GB of memory and
10 GB of disk; the checkpoints are removed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.steps.zero_stages import CONFIG, write_data
from trainer.checkpoint import checkpoints_in
from trainer.config import load_config
from trainer.device import peak_memory
from trainer.formatting import GIB
from trainer.parallel.grid import Grid
from trainer.state import TrainState
from trainer.step import StepResult
from trainer.trainer import Trainer

SETTINGS = (
    "optim.muon.coarse_steps=1",  # what is measured is not the update
    "optim.muon.fine_steps=1",
    "model.hidden_size=512",
    "model.n_routed_experts=72",
    "model.moe_intermediate_size=256",
    "model.num_nextn_predict_layers=1",
    "data.seq_len=64",
    "data.global_batch_size=1",
    "data.micro_batch_size=1",
    "checkpoint.every=0",
    "evaluation.every=0",
    "evaluation.max_rows=1",
    "metrics.every=1000",
    "metrics.layer_stats_every=0",
    "metrics.wandb.mode=disabled",
)
COPY_BYTES = 256 << 20
MODES = ("async", "sync")


@dataclass
class Measured:
    """Seconds of steps with a save, by its mode, and of those without one, by what was going on."""

    pauses: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    """Seconds of the calls that save, by the mode."""
    saves: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    steps: dict[str, list[float]] = field(default_factory=lambda: {"quiet": [], "beside": []})
    written: list[float] = field(default_factory=list)
    """Seconds from a copy to the checkpoint's publication."""


class Saves:
    """The last hook of every step: saves in turn in both modes, and measures whole steps."""

    def __init__(self, trainer: Trainer, every: int) -> None:
        self.trainer, self.every = trainer, every
        self.measured = Measured()
        self._last: float | None = None

    def __call__(self, state: TrainState, result: StepResult) -> None:
        checkpoint, mode, waited = self.trainer.checkpoint, None, 0.0
        assert checkpoint.background is not None
        beside = checkpoint.background.is_writing
        if state.step % self.every == 0 and state.step < self.trainer.recipe.steps:
            mode = MODES[state.step // self.every % 2 - 1]
            start = time.perf_counter()
            checkpoint.finish()  # the save before is no part of this one
            begun = time.perf_counter()
            waited = begun - start
            (checkpoint.begin_save if mode == "async" else checkpoint.save)(state)
            self.measured.pauses[mode].append(time.perf_counter() - begun)
        checkpoint.prune()
        now = time.perf_counter()
        self.measured.written += [report.seconds for report in checkpoint.reports()]
        if self._last is not None and state.step > 2:
            of_step = self.measured.steps["beside" if beside else "quiet"]
            row = of_step if mode is None else self.measured.saves[mode]
            row.append(now - self._last - waited)
        self._last = now


def copy_rate() -> float:
    """Returns the bytes per second of a copy in memory, the median of some."""
    source, target = (torch.ones(COPY_BYTES // 4) for _ in range(2))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return COPY_BYTES / statistics.median(times)


def table_of(measured: Measured, nbytes: int, rate: float) -> Table:
    """Returns pauses by mode."""
    quiet = statistics.median(measured.steps["quiet"])
    table = Table(
        title=f"{nbytes / GIB:.2f} GiB of weights and states; a step without a save takes "
        f"{quiet:.2f} s (median of {len(measured.steps['quiet'])})",
        title_justify="left",
    )
    for name in (
        *("checkpoint.mode", "saves", "median pause, s", "longest pause, s", "x the floor"),
        "a step with one longer by, s",
    ):
        table.add_column(name, justify="left" if name == "checkpoint.mode" else "right")
    floor = nbytes / rate
    for mode in MODES:
        pauses = measured.pauses[mode]
        values = statistics.median(pauses), max(pauses)
        cells = [f"{value:.2f}" for value in values]
        longer = statistics.median(measured.saves[mode]) - quiet
        row = [mode, str(len(pauses)), *cells, f"{values[1] / floor:.1f}", f"{longer:.1f}"]
        table.add_row(*row)
    table.add_section()
    table.add_row(f"floor: one copy at {rate / 1e9:.1f} GB/s", "", "", f"{floor:.2f}", "1.0", "")
    return table


def main() -> None:
    """Trains, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--saves", type=int, default=3, help="in each mode")
    parser.add_argument("--every", type=int, default=4, help="steps between saves")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    steps = options.every * (2 * options.saves + 1) + 1
    settings = [*SETTINGS, f"steps={steps}", f"run_dir={options.folder / 'run'}"]
    data = write_data(options.folder, [])
    shutil.rmtree(options.folder / "run", ignore_errors=True)
    rate = copy_rate()
    trainer = Trainer(load_config(CONFIG, [*settings, *data, *options.overrides]), Grid.single())
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    trainer.checkpoint.save_beside_training()
    assert trainer.checkpoint.background is not None
    nbytes = trainer.checkpoint.background.nbytes
    saves = Saves(trainer, options.every)
    trainer.periodic = [saves]
    trainer.run()
    console = Console(width=120)
    console.print(
        f"{parameters:,} parameters, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    console.print(table_of(saves.measured, nbytes, rate))
    beside = saves.measured.steps["beside"]
    if beside:
        console.print(
            f"steps while a checkpoint was written: {statistics.median(beside):.2f} s (median of "
            f"{len(beside)}); it was published {statistics.median(saves.measured.written):.1f} s "
            f"after its copy; peak resident memory {peak_memory(trainer.grid.device) / GIB:.2f} "
            f"GiB, {psutil.virtual_memory().available / GIB:.1f} GiB available at the end"
        )
    for path in checkpoints_in(trainer.checkpoint.folder.folder):
        shutil.rmtree(path)


if __name__ == "__main__":
    main()
