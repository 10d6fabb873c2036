"""Injected spikes: when they are detected, and how a run continues with and without rollback.

    python -m benchmarks.recipe.spikes FOLDER --size demo --fault-at 1206
    python -m benchmarks.recipe.spikes FOLDER --size small --calm 2000

The first form trains a model on the demo's text for a while, and from that checkpoint goes on seven
times: undisturbed, and with each of three faults with and without `stability.spikes`. The
faults: one batch of random tokens, a router's row scaled by 100, and a learning rate 50 times too
large for three steps. In the 30 steps after the fault the learning rate decays to a tenth, so that
the end is no matter of chance. Compared are the validation loss there and, as a mean over these
steps, by how much the loss of training is above that of the undisturbed run, which sees the
same batches. The other form trains without a fault and counts the alarms. Sizes are those of
benchmarks/recipe/stability_runs.py. Cut at any time and started again, all go on: long runs from
their newest checkpoint, a run with a fault from the common one.
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
from trainer.metrics.jsonl import read_events, read_metrics
from trainer.stability.spikes import SpikeDetector, severity
from trainer.trainer import Trainer

BEFORE, AFTER = 5, 30
"""Steps of the common checkpoint before the fault, and after it."""
SETTINGS = (
    "stability.spikes={snapshot_every: 10, min_history: 12}",
    "stability.anticipatory_routing.active_steps=20",
    "optim.schedule.decay_fraction=0.0",
)
CUT = ("checkpoint.every=50",)
Fault = Callable[[Trainer, int], None]


def corrupted_batch(trainer: Trainer, at: int) -> None:
    """Step `at` reads random tokens, however often it comes."""
    plain, vocabulary = trainer.anticipation.fetch, trainer.config.data.tokenizer.vocab_size

    def fetch(step: int) -> list[Batch]:
        batches = plain(step)
        if step != at:
            return batches
        noise = torch.Generator().manual_seed(0)

        def random(like: torch.Tensor) -> torch.Tensor:
            return torch.randint(3, vocabulary, like.shape, generator=noise)

        return [replace(b, tokens=random(b.tokens), targets=random(b.targets)) for b in batches]

    trainer.anticipation.fetch = fetch


def scaled_router(trainer: Trainer, at: int) -> None:
    """A row of the first learned router is 100 times too large from step `at` on.

    It is that of the expert that tokens like best: the one with the least bias against its load.
    """
    plain, left = trainer.stability.before_step, [at]
    router = trainer.model.routers()[trainer.config.model.num_hash_layers]

    def before_step() -> None:
        plain()
        if trainer.state.step in left:
            left.clear()
            with torch.no_grad():
                router.weight[router.bias.argmin()] *= 100.0

    trainer.stability.before_step = before_step  # type: ignore[method-assign]


def learning_rate(trainer: Trainer, at: int) -> None:
    """Updates of steps `at` to `at` + 2 at 50 times the learning rate, the first time they come."""
    plain, before, left = trainer.engine.step, trainer.stability.before_step, {at, at + 1, at + 2}
    factor = [1.0]

    def before_step() -> None:
        before()
        factor[0] = 50.0 if trainer.state.step in left else 1.0
        left.discard(trainer.state.step)

    def step(rate: float, norm: torch.Tensor) -> None:
        plain(rate * factor[0], norm)

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
        return config_of(self.size, self.folder, name, steps, *self.settings, *settings)

    def common(self, steps: int) -> Path:
        """The folder of the steps that all runs have in common."""
        config = self.config("common", steps, *CUT)
        if steps_done(config.run_dir) < steps:
            trainer_of(config).run()
        return config.run_dir

    def with_fault(self, name: str, fault: Fault | None, at: int, *settings: str) -> Path:
        """Go on from the common checkpoint, with the fault in step `at`, counted from 0."""
        end = at + 1 + AFTER
        decay = f"optim.schedule.decay_fraction={AFTER / end}"
        config = self.config(name, end, decay, f"evaluation.every={end}", *settings)
        if steps_done(config.run_dir) < end:
            shutil.rmtree(config.run_dir, ignore_errors=True)  # it was cut: a fault comes only once
            shutil.copytree(self.common(at - BEFORE), config.run_dir)
            trainer = trainer_of(config)
            if fault is not None:
                fault(trainer, at)
            trainer.run()
        return config.run_dir


def steps_done(run_dir: Path) -> int:
    """Steps in the run's metrics; a run that ended has all of them."""
    path = run_dir / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() else []
    return int(records[-1]["step"]) if records else 0


def validation(run_dir: Path) -> float:
    """The validation loss after the last step."""
    return float(read_metrics(run_dir / "metrics.jsonl")[-1]["validation_loss"])


def faults(runs: Runs, at: int) -> Table:
    """Runs every fault with and without rollback, and the undisturbed run."""
    calm = runs.with_fault("undisturbed", None, at)
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
    for column in ("above in training", "no rollback", "difference", "above in training"):
        table.add_column(column, justify="right")
    for name, fault in FAULTS.items():
        turned = runs.with_fault(f"{name}, with", fault, at)
        not_turned = runs.with_fault(f"{name}, without", fault, at, "stability.spikes=null")
        events = [event for _, event in read_events(turned / "metrics.jsonl")]
        table.add_row(
            name,
            ", ".join(str(event["spike_step"]) for event in events),
            ", ".join(str(event["restored_step"]) for event in events),
            f"{validation(calm):.4f}",
            *compared(turned, calm, at),
            *compared(not_turned, calm, at),
        )
    return table


def compared(run_dir: Path, calm: Path, at: int) -> list[str]:
    """The validation loss, how far it is from the undisturbed one, and the loss of training."""
    ours, plain = (
        {record["step"]: record.get("lm_loss") for record in read_metrics(path / "metrics.jsonl")}
        for path in (run_dir, calm)
    )
    steps = [step for step in range(at + 2, at + 2 + AFTER) if ours.get(step) is not None]
    above = sum(ours[step] - plain[step] for step in steps) / len(steps)
    found = validation(run_dir)
    return [f"{found:.4f}", f"{found - validation(calm):+.4f}", f"{above:+.4f}"]


def calm(runs: Runs, steps: int) -> str:
    """Train without a fault and count the alarms, and how close it came to one."""
    config = runs.config("calm", steps, *CUT)
    trainer_of(config).run()
    path = config.run_dir / "metrics.jsonl"
    records, events = read_metrics(path), read_events(path)
    assert config.stability.spikes is not None
    detector = SpikeDetector(config.stability.spikes)
    most, past = 0.0, {}
    for record in records:
        numbers = {
            "loss": record["loss"],
            "grad_norm": record["grad_norm"],
            "max_expert_share": 0.0,
        }
        most = max(most, severity(detector.scores(past, numbers)))
        detector.problem(past, numbers)
    return (
        f"{len(records)} steps, {len(events)} alarms; loss and gradient norm together came to "
        f"{most:.1f} deviations, an alarm is at {config.stability.spikes.threshold:g}"
    )


def main() -> None:
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
