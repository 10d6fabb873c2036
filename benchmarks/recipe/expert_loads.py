"""Expert loads of the learned routers, with and without the bias that balances them.

    python -m benchmarks.recipe.expert_loads FOLDER --size demo [--speeds 0 0.01] [--steps 300]

Trains a model of benchmarks/recipe/stability_runs.py once for every speed of the bias. For every
learned layer it prints the largest load of an expert over the mean, of single steps (the median of
the last 20) and of the last 20 steps together, and the step from which on the median of 20 steps
is at most 1.3.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.recipe.stability_runs import Size, config_of, trainer_of
from trainer.trainer import Trainer

LAST, BALANCED = 20, 1.3


def loads_of(trainer: Trainer) -> Tensor:
    """Trains, and returns the loads of every step, [steps, layers (+ MTP), E]."""
    original, loads = trainer.engine.forward_backward, []

    def forward_backward(*arguments: Any) -> Any:
        losses = original(*arguments)
        loads.append(losses.expert_load.clone())
        return losses

    trainer.engine.forward_backward = forward_backward  # type: ignore[method-assign]
    trainer.run()
    return torch.stack(loads).double()


def load_ratio(load_E: Tensor) -> Tensor:
    """Returns the largest load over the mean."""
    return load_E.amax(-1) / load_E.mean(-1)


def balanced_since(ratios: Sequence[float]) -> str:
    """Returns the first step from which on the median of LAST steps stays at most BALANCED."""
    since = None
    for step in range(LAST, len(ratios) + 1):
        if median(ratios[step - LAST : step]) > BALANCED:
            since = None
        elif since is None:
            since = step
    return "never" if since is None else str(since)


def main() -> None:
    """Trains with every speed and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=get_args(Size), default="small")
    parser.add_argument("--speeds", type=float, nargs="+", default=[0.0, 0.001, 0.01])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    table = Table(title=f"largest expert load over mean, {options.steps} steps")
    for column in ("bias speed", "layer", "one step", f"{LAST} steps", f"at most {BALANCED} since"):
        table.add_column(column, justify="right")
    for speed in options.speeds:
        settings = (f"router_bias_speed={speed}", *options.overrides)
        config = config_of(
            options.size, options.folder, f"speed {speed:g}", options.steps, *settings
        )
        loads = loads_of(trainer_of(config))
        for layer in range(config.model.num_hash_layers, loads.shape[1]):
            ratios = load_ratio(loads[:, layer]).tolist()
            table.add_row(
                f"{speed:g}",
                "MTP" if layer == config.model.num_hidden_layers else str(layer),
                f"{median(ratios[-LAST:]):.2f}",
                f"{float(load_ratio(loads[-LAST:, layer].sum(0))):.2f}",
                balanced_since(ratios),
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
