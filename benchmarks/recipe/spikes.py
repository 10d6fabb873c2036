"""Injected spikes: when they are detected, and how a run continues with and without rollback.

    python -m benchmarks.recipe.spikes FOLDER --size demo --fault-at 1206
    python -m benchmarks.recipe.spikes FOLDER --size small --calm 2000

The first form trains a model on the demo's text for a while, and resumes from that checkpoint
seven times: undisturbed, and with each of three faults with and without `stability.spikes`. The
faults: one batch of random tokens, a router's row scaled by 100, and a learning rate 50 times too
large for three steps. In the 30 steps after the fault the learning rate decays to a tenth, so that
the end does not depend on chance. It compares the validation loss there and, averaged over these
steps, the training loss minus that of the undisturbed run, which sees the same batches. The other
form trains without a fault and counts the alarms. Sizes are those of
benchmarks/recipe/stability_runs.py. After an interruption, the same command resumes: long runs
from their newest checkpoint, a run with a fault from the common one.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.recipe.stability_runs import Size, config_of, trainer_of
from data import Batch
from trainer.config import RunConfig
from trainer.metrics import read_events, read_metrics
from trainer.stability import SpikeDetector, severity
from trainer.trainer import Trainer

BEFORE, AFTER = 5, 30
"""Steps of the common checkpoint before the fault, and after it."""
SETTINGS = (
    "stability.spikes={snapshot_every: 10, min_history: 12}",
    "stability.anticipatory_routing.active_steps=20",
    "optim.schedule.decay_fraction=0.0",
)
SAVING = ("checkpoint.every=50",)
Fault = Callable[[Trainer, int], None]


def corrupted_batch(trainer: Trainer, at: int) -> None:
    """Makes step `at` read random tokens, every time it runs."""
    original, vocabulary = trainer.anticipation.fetch, trainer.config.data.tokenizer.vocab_size

    def fetch(step: int) -> list[Batch]:
        batches = original(step)
        if step != at:
            return batches
        noise = torch.Generator().manual_seed(0)

        def random(like: torch.Tensor) -> torch.Tensor:
            return torch.randint(3, vocabulary, like.shape, generator=noise)

        return [replace(b, tokens=random(b.tokens), targets=random(b.targets)) for b in batches]

    trainer.anticipation.fetch = fetch


def scaled_router(trainer: Trainer, at: int) -> None:
    """Scales a row of the first learned router by 100, once, before step `at`.

    It is the row of the most popular expert, the one with the lowest bias.
    """
    original, pending = trainer.stability.before_step, [at]
    router = trainer.model.routers()[trainer.config.model.num_hash_layers]

    def before_step() -> None:
        original()
        if trainer.state.step in pending:
            pending.clear()
            with torch.no_grad():
                router.weight[router.bias.argmin()] *= 100.0

    trainer.stability.before_step = before_step  # type: ignore[method-assign]


def learning_rate(trainer: Trainer, at: int) -> None:
    """Multiplies the learning rate of steps `at` to `at` + 2 by 50, the first time they run."""
    original, before = trainer.engine.step, trainer.stability.before_step
    pending = {at, at + 1, at + 2}
    factor = [1.0]

    def before_step() -> None:
        before()
        factor[0] = 50.0 if trainer.state.step in pending else 1.0
        pending.discard(trainer.state.step)

    def step(rate: float, norm: torch.Tensor) -> None:
        original(rate * factor[0], norm)

    trainer.stability.before_step = before_step  # type: ignore[method-assign]
    trainer.engine.step = step  # type: ignore[method-assign]


FAULTS: dict[str, Fault] = {
    "corrupted batch": corrupted_batch,
    "router row x 100": scaled_router,
    "learning rate x 50, 3 steps": learning_rate,
}


class Runs:
    """Runs of one size in one folder, each at most once."""

    def __init__(self, size: Size, folder: Path, settings: Sequence[str]) -> None:
        self.size, self.folder = size, folder
        self.settings = (*SETTINGS, *settings)

    def config(self, name: str, steps: int, *settings: str) -> RunConfig:
        """Returns the config of one of the runs."""
        return config_of(self.size, self.folder, name, steps, *self.settings, *settings)

    def common(self, steps: int) -> Path:
        """Trains the steps that all runs share, and returns their folder."""
        config = self.config("common", steps, *SAVING)
        if steps_done(config.run_dir) < steps:
            trainer_of(config).run()
        return config.run_dir

    def with_fault(self, name: str, fault: Fault | None, at: int, *settings: str) -> Path:
        """Resumes from the common checkpoint, with the fault in step `at`, counted from 0."""
        end = at + 1 + AFTER
        decay = f"optim.schedule.decay_fraction={AFTER / end}"
        config = self.config(name, end, decay, f"evaluation.every={end}", *settings)
        if steps_done(config.run_dir) < end:
            shutil.rmtree(
                config.run_dir, ignore_errors=True
            )  # interrupted: a fault happens only once
            shutil.copytree(self.common(at - BEFORE), config.run_dir)
            trainer = trainer_of(config)
            if fault is not None:
                fault(trainer, at)
            trainer.run()
        return config.run_dir


def steps_done(run_dir: Path) -> int:
    """Returns the last step of the run's metrics; a finished run has all steps."""
    path = run_dir / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() else []
    return int(records[-1]["step"]) if records else 0


def validation(run_dir: Path) -> float:
    """Returns the validation loss after the last step."""
    return float(read_metrics(run_dir / "metrics.jsonl")[-1]["validation_loss"])


def faults(runs: Runs, at: int) -> Table:
    """Runs every fault with and without rollback, and the undisturbed run."""
    undisturbed = runs.with_fault("undisturbed", None, at)
    table = Table(title=f"validation loss after step {at + 1 + AFTER}, the fault in step {at + 1}")
    for column in (
        "fault",
        "detected in step",
        "rolled back to",
        "undisturbed",
        "with rollback",
        "difference",
    ):
        table.add_column(column, justify="right")
    for column in ("training loss above", "no rollback", "difference", "training loss above"):
        table.add_column(column, justify="right")
    for name, fault in FAULTS.items():
        rolled_back = runs.with_fault(f"{name}, with", fault, at)
        applied = runs.with_fault(f"{name}, without", fault, at, "stability.spikes=null")
        events = [event for _, event in read_events(rolled_back / "metrics.jsonl")]
        table.add_row(
            name,
            ", ".join(str(event["spike_step"]) for event in events),
            ", ".join(str(event["restored_step"]) for event in events),
            f"{validation(undisturbed):.4f}",
            *compared(rolled_back, undisturbed, at),
            *compared(applied, undisturbed, at),
        )
    return table


def compared(run_dir: Path, undisturbed: Path, at: int) -> list[str]:
    """Returns the validation loss, and its and the training loss's excess over undisturbed."""
    losses, reference = (
        {record["step"]: record.get("lm_loss") for record in read_metrics(path / "metrics.jsonl")}
        for path in (run_dir, undisturbed)
    )
    steps = [step for step in range(at + 2, at + 2 + AFTER) if losses.get(step) is not None]
    above = sum(losses[step] - reference[step] for step in steps) / len(steps)
    loss = validation(run_dir)
    return [f"{loss:.4f}", f"{loss - validation(undisturbed):+.4f}", f"{above:+.4f}"]


def calm(runs: Runs, steps: int) -> str:
    """Trains without a fault; reports the alarms, and how close it came to one."""
    config = runs.config("calm", steps, *SAVING)
    trainer_of(config).run()
    path = config.run_dir / "metrics.jsonl"
    records, events = read_metrics(path), read_events(path)
    assert config.stability.spikes is not None
    detector = SpikeDetector(config.stability.spikes)
    highest, past = 0.0, {}
    for record in records:
        numbers = {
            "loss": record["loss"],
            "grad_norm": record["grad_norm"],
            "max_expert_share": 0.0,
        }
        highest = max(highest, severity(detector.scores(past, numbers)))
        detector.problem(past, numbers)
    return (
        f"{len(records)} steps, {len(events)} alarms; loss and gradient norm together reached "
        f"{highest:.1f} deviations, an alarm is at {config.stability.spikes.threshold:g}"
    )


def main() -> None:
    """Runs one of the two forms."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=get_args(Size), default="small")
    parser.add_argument("--fault-at", type=int, default=336)
    parser.add_argument("--calm", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    runs = Runs(options.size, options.folder, options.overrides)
    if options.calm:
        print(calm(runs, options.calm))
    else:
        Console(width=170).print(faults(runs, options.fault_at - 1))


if __name__ == "__main__":
    main()
