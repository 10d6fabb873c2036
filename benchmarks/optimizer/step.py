"""Time and traffic of the optimizer's step compared with other optimizers, in one run.

The matrices are those of one layer of a model, with random gradients. On one process of two
threads: ours (ten Newton–Schulz steps in fp32) is compared with the bare matmuls of the same
batches, which are the floor, with torch.optim.Muon (five steps in bf16, its time doubled for equal
work), and with one matrix at a time, for a large and a small model. On two processes of one thread
each: backward, reduction, update and gather of the parameters, compared with DeepSpeed's Muon in
ZeRO-2, which compiles itself, and the bytes of both with those of an all-reduce. The candidates
alternate; times are medians, and so are ratios, taken round by round. Takes about two minutes on
two cores.

    python -m benchmarks.optimizer.step [CONFIG] [--small configs/debug.yaml] [--threads 2]
"""

from __future__ import annotations

import argparse
import platform
import statistics

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.optimizer.tasks import (
    Matrices,
    bare_matmuls,
    interleaved,
    our_step,
    ratio,
    torch_step,
)
from benchmarks.optimizer.two_processes import two_process_table
from optim import MuonConfig

OURS, FLOOR = "ours", "bare matmuls of the same batches"
ONE, TORCH = "ours, one matrix after another", "torch.optim.Muon"
TORCH_STEPS = 5


def single_process(name: str, matrices: Matrices, rounds: int) -> Table:
    """Measures one process: ours, the floor, one matrix after another, and torch's."""
    muon = MuonConfig()
    steps = muon.coarse_steps + muon.fine_steps
    calls = {
        OURS: our_step(matrices, muon),
        FLOOR: bare_matmuls(matrices, muon),
        ONE: our_step(matrices, MuonConfig(max_batch_bytes=1)),
        TORCH: torch_step(matrices),
    }
    seconds = interleaved(calls, rounds)
    seconds[TORCH] = [time * steps / TORCH_STEPS for time in seconds[TORCH]]
    flops = matrices.flops(muon)
    table = Table(
        title=f"{name}: {matrices.count} matrices, {flops / 1e9:,.1f} GFLOP a step, "
        f"{rounds} rounds",
        caption=f"share of the floor's rate: {ratio(seconds, FLOOR, OURS):.0%}; "
        f"torch's time is multiplied by {steps}/{TORCH_STEPS}, for equal work",
    )
    for column in ("", "ms", "GFLOP/s", "over ours"):
        table.add_column(column, justify="right" if column else "left")
    for label, times in seconds.items():
        median = statistics.median(times)
        rate = f"{flops / median / 1e9:,.0f}"
        table.add_row(label, f"{median * 1e3:,.1f}", rate, f"{ratio(seconds, label, OURS):.2f}x")
    return table


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="configs/nano.yaml")
    parser.add_argument("--small", default="configs/debug.yaml")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--experts", type=int, default=4, help="maximum, of the larger model")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=140)
    console.print(f"{arguments.threads} threads of {platform.machine()}, torch {torch.__version__}")
    large, small = Matrices(arguments.config, arguments.experts), Matrices(arguments.small)
    console.print(single_process(arguments.config, large, arguments.rounds))
    console.print(single_process(arguments.small, small, 2 * arguments.rounds))
    console.print(two_process_table(arguments.config, arguments.experts, arguments.rounds))


if __name__ == "__main__":
    main()
