"""The cost of anticipatory routing per step.

    python -m benchmarks.recipe.anticipation FOLDER [--rounds 8] [--threads 2] [key=value ...]

Trains configs/debug.yaml on the demo's text in two trainers, with and without anticipatory
routing, alternating step by step. Compares the median steps in CPU seconds, which other work on
the machine disturbs less than elapsed time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch

from trainer.config import load_config
from trainer.parallel.grid import Grid
from trainer.process.local_device import local_device
from trainer.trainer import Trainer

WARMUP = 2


def trainer_of(folder: Path, name: str, *settings: str) -> Trainer:
    """Returns a trainer of the debug model that writes nothing."""
    fixed = (
        "metrics.wandb.mode=disabled",
        "metrics.layer_stats_every=0",
        f"run_dir={folder / name}",
    )
    trainer = Trainer(
        load_config("configs/debug.yaml", [*fixed, *settings]), Grid.single(local_device("auto"))
    )
    trainer.anticipation.configure(trainer.state)
    return trainer


def seconds(trainer: Trainer) -> float:
    """Trains one step; returns its CPU seconds, over all cores."""
    start = time.process_time()
    trainer.step(trainer.anticipation.batches(trainer.state.step))
    trainer.state.step += 1
    return time.process_time() - start


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(options.threads)
    plain = trainer_of(options.folder, "plain", *options.overrides)
    always = "stability.anticipatory_routing.when=always"
    anticipatory = trainer_of(options.folder, "anticipatory", always, *options.overrides)
    times: list[tuple[float, float]] = []
    for _ in range(WARMUP + options.rounds):
        times.append((seconds(plain), seconds(anticipatory)))
    off, on = (median(values) for values in zip(*times[WARMUP:], strict=True))
    print(
        f"step: {off:.3f} s without and {on:.3f} s with anticipatory routing: {on / off - 1:+.1%}"
    )


if __name__ == "__main__":
    main()
