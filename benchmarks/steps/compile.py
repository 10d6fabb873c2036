"""A training step with and without `compile`: CPU time and losses.

Two engines with models of the same config and seed train on the same rows in one process,
alternating step by step, and so does the order within a step. Ratios are medians of the ratios of
each step. The first compiled step shows the cost of compiling, in this process and the compiler's;
torch caches programs on disk, so a second run on the machine shows the cost of loading them
(`--fresh` uses an empty cache).

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
from trainer.build import build_native
from trainer.config import RunConfig, load_config
from trainer.engine import NativeEngine
from trainer.parallel.grid import Grid
from trainer.process.local_device import local_device

LEARNING_RATE = 1e-4


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of its finished children."""
    process, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return process.ru_utime + process.ru_stime + children.ru_utime + children.ru_stime


@dataclass
class Runner:
    """An engine, and the CPU seconds of its steps: forward and backward, and in total."""

    engine: NativeEngine
    passes: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(self, batches: list) -> None:
        """Trains one step."""
        begin = cpu_seconds()
        losses = self.engine.forward_backward(batches)
        self.passes.append(cpu_seconds() - begin)
        self.engine.step(LEARNING_RATE, self.engine.gradient_norm())
        self.engine.model.update_router_bias(losses.expert_load)
        self.steps.append(cpu_seconds() - begin)
        self.losses.append(float(losses.loss))


def runner(config: RunConfig) -> Runner:
    """Returns an untrained run on one process."""
    grid = Grid.single(local_device("auto"))
    local, optimizer = build_native(config, grid)
    return Runner(NativeEngine(local, grid, optimizer))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", nargs="?", default="configs/debug.yaml")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--fresh", action="store_true", help="ignore programs of earlier runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.fresh:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        measure(arguments.config, arguments.steps, arguments.overrides)


def measure(path: str, steps: int, overrides: list[str]) -> None:
    """Trains both in turn and prints the comparison."""
    config = load_config(path, [*overrides, "kernels=eager"])
    rows = [phase.rows for phase in config.recipe.phases]
    loader = Loader(config.data, config.seed, 0, 1, phases=rows)
    plain, compiled = runner(config), runner(config.model_copy(update={"kernels": "compile"}))
    for step in range(steps + 1):
        batches = loader.at(step)
        for each in (plain, compiled) if step % 2 else (compiled, plain):
            each.step(batches)
    compiling = compiled.steps[0] - statistics.median(compiled.steps[1:])
    gap = max(abs(a - b) / a for a, b in zip(plain.losses, compiled.losses, strict=True))
    console = Console(width=100)
    console.print(
        f"{path}, {config.precision}, {torch.get_num_threads()} threads of "
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}: {steps} steps "
        "each, alternating"
    )
    for name in ("passes", "steps"):
        pairs = list(zip(getattr(plain, name), getattr(compiled, name), strict=True))[1:]
        ratios = sorted(b / a for a, b in pairs)
        what = "forward and backward" if name == "passes" else "whole step"
        console.print(
            f"{what}: {statistics.median(a for a, _ in pairs):.3f} s of CPU time plain, "
            f"{statistics.median(b for _, b in pairs):.3f} s compiled; ratio "
            f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )
    console.print(f"compiling: {compiling:.0f} s of CPU time in the first step")
    console.print(f"losses of {steps + 1} steps differ by at most {gap:.1e}, relative")


if __name__ == "__main__":
    main()
