"""What anticipatory routing adds to a step.

    python -m benchmarks.recipe.anticipation FOLDER [--rounds 8] [--threads 2] [key=value ...]

Trains configs/debug.yaml on the demo's text twice side by side, plainly and with the experts chosen
ahead, step after step in turn. The median step of each counts, in seconds of processors, which
other work on the machine disturbs less than the clock's.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch

from trainer.config import load_config
from trainer.parallel.grid import Grid
from trainer.trainer import Trainer

WARM = 2


def trainer_of(folder: Path, name: str, *settings: str) -> Trainer:
    """A trainer of the debug model that writes nothing."""
    fixed = (
        "metrics.wandb.mode=disabled",
        "metrics.layer_stats_every=0",
        f"run_dir={folder / name}",
    )
    trainer = Trainer(load_config("configs/debug.yaml", [*fixed, *settings]), Grid.single())
    trainer.anticipation.begin(trainer.state)
    return trainer


def seconds(trainer: Trainer) -> float:
    """Of all processors, for one step."""
    start = time.process_time()
    trainer.step(trainer.anticipation.batches(trainer.state.step))
    trainer.state.step += 1
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(options.threads)
    plain = trainer_of(options.folder, "plain", *options.overrides)
    always = "stability.anticipatory_routing.when=always"
    ahead = trainer_of(options.folder, "ahead", always, *options.overrides)
    times: list[tuple[float, float]] = []
    for _ in range(WARM + options.rounds):
        times.append((seconds(plain), seconds(ahead)))
    one, other = (median(values) for values in zip(*times[WARM:], strict=True))
    more = other / one - 1
    print(f"step: {one:.3f} s plainly, {other:.3f} s with experts chosen ahead: {more:+.1%}")


if __name__ == "__main__":
    main()
