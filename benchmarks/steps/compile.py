"""A training step with and without `compile`, in one process by turns: processor time and losses.

The second engine holds a model of the same config and seed. Both train on the same rows; each step
is taken by one and then by the other, whose turn is first alternating, and the shares of the step
are medians of the steps' ratios. The compiled one's first step shows what making the programs
costs, in this process and the compiler's; torch keeps them on disk, so that a second run on the
machine shows what it costs to find them (`--fresh` uses a new folder).

    python -m benchmarks.steps.compile [CONFIG] [--steps 12] [--fresh] [key=value ...]
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import tempfile
from dataclasses import dataclass, field

import torch
from rich.console import Console

from data import Loader
from trainer.build import build
from trainer.config import RunConfig, load_config
from trainer.engine import NativeEngine
from trainer.parallel.grid import Grid

LEARNING_RATE = 1e-4


def processor_seconds() -> float:
    """Of this process, its threads and its children that have ended."""
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


@dataclass
class Runner:
    """An engine that trains, and what its steps took: forward and backward, and all, in seconds."""

    engine: NativeEngine
    passes: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(self, batches: list) -> None:
        """One step."""
        begin = processor_seconds()
        losses = self.engine.forward_backward(batches)
        self.passes.append(processor_seconds() - begin)
        self.engine.step(LEARNING_RATE, self.engine.gradient_norm())
        self.engine.model.update_router_bias(losses.expert_load)
        self.steps.append(processor_seconds() - begin)
        self.losses.append(float(losses.loss))


def runner(config: RunConfig) -> Runner:
    """A run of one process that has not begun."""
    grid = Grid.single()
    local, optimizer = build(config, grid)
    return Runner(NativeEngine(local, grid, optimizer))


def main() -> None:
    """Train both and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", nargs="?", default="configs/debug.yaml")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--fresh", action="store_true", help="find no programs of earlier runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.fresh:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        measure(arguments.config, arguments.steps, arguments.overrides)


def measure(path: str, steps: int, overrides: list[str]) -> None:
    """Both runs by turns, and a few lines."""
    config = load_config(path, [*overrides, "compile=false"])
    rows = [phase.rows for phase in config.recipe.phases]
    loader = Loader(config.data, config.seed, 0, 1, phases=rows)
    plain, compiled = runner(config), runner(config.model_copy(update={"compile": True}))
    for step in range(steps + 1):
        batches = loader.at(step)
        for one in (plain, compiled) if step % 2 else (compiled, plain):
            one.step(batches)
    made = compiled.steps[0] - statistics.median(compiled.steps[1:])
    gap = max(abs(a - b) / a for a, b in zip(plain.losses, compiled.losses, strict=True))
    console = Console(width=100)
    console.print(
        f"{path}, {config.precision}, {torch.get_num_threads()} threads of "
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}: {steps} steps "
        "each, by turns"
    )
    for name in ("passes", "steps"):
        pairs = list(zip(getattr(plain, name), getattr(compiled, name), strict=True))[1:]
        ratios = sorted(b / a for a, b in pairs)
        what = "forward and backward" if name == "passes" else "whole step"
        console.print(
            f"{what}: {statistics.median(a for a, _ in pairs):.3f} s of processor time plain, "
            f"{statistics.median(b for _, b in pairs):.3f} s compiled; ratio "
            f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )
    console.print(f"programs: {made:.0f} s of processor time in the first step")
    console.print(f"losses of {steps + 1} steps differ by {gap:.1e} of their size at most")


if __name__ == "__main__":
    main()
