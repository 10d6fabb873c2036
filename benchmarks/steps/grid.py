"""Forward and backward at many sizes, compared with transformers: the best and the worst ratio.

Four layers (window, CSA, HCA, CSA) of debug.yaml, four experts a token: hidden size, experts, row
length and rows vary. Ours runs before and after transformers and its best call counts, since a
machine's speed drifts. transformers runs rows of 8192 one after another: its logits of four would
take some 60 GB.

    python -m benchmarks.steps.grid [--size small] [--lengths 512 2048] [--threads 2]

`--size small` measures the corners of the grid up to 2048 tokens; `--lengths` only these rows.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd.profiler import profile

from benchmarks.steps.vs_transformers import build, calls, matmul_rate
from model import ModelConfig
from model.flops import training_flops
from trainer.config import load_config

HIDDEN, EXPERTS, LENGTHS, ROWS = (128, 256, 512), (8, 16, 64), (512, 2048, 8192), (1, 4)
SMALL = (128, 512), (8, 64), (512, 2048), (1,)
WANTED = {512: (3, 2), 2048: (8, 5), 8192: (30, 15)}
"""By row length, what multiple of transformers' speed is wanted, and what is the least."""
ALONE = 8192
"""Rows of this length go through transformers one at a time."""
SECONDS, MAX_CALLS = 1.5, 8
"""Calls are repeated for so long, and so often at most."""


@dataclass(frozen=True)
class Cell:
    """One size of the grid, and what was measured.

    Attributes:
        seconds, their_seconds: of one step of all rows.
        share: of the machine's matmul rate, ours.
        operators: torch operators of a step of ours, those called by others included.
    """

    hidden: int
    experts: int
    length: int
    rows: int
    seconds: float
    their_seconds: float
    share: float
    operators: int

    @property
    def ratio(self) -> float:
        return self.their_seconds / self.seconds


def config_of(base: ModelConfig, hidden: int, experts: int) -> ModelConfig:
    """Returns the grid's model: four layers without multi-token prediction and balance loss."""
    sizes = {
        "hidden_size": hidden,
        "n_routed_experts": experts,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 4,
        "layer_types": ("window", "csa", "hca", "csa"),
        "num_nextn_predict_layers": 0,
        "balance_loss_weight": 0.0,
    }
    return ModelConfig.model_validate({**base.model_dump(), **sizes})


def best_seconds(call: Callable[[], object]) -> float:
    """Returns the time of the best of several calls; a long first call is the only one."""
    end, best = time.perf_counter() + SECONDS, float("inf")
    for _ in range(MAX_CALLS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return best


def operators_of(call: Callable[[], object]) -> int:
    """Counts torch's operators in a call, those that others call included."""
    with profile(use_kineto=False) as profiler:
        call()
    return sum(event.name.startswith("aten::") for event in profiler.function_events)


def measure(
    base: ModelConfig, hidden: int, experts: int, sizes: list[tuple[int, int]], rate: float
) -> Iterator[Cell]:
    """Measures one model at several (row length, rows)."""
    config = config_of(base, hidden, experts)
    ours, theirs = build(config)
    alone: dict[int, float] = {}  # seconds of transformers for one row
    for length, rows in sizes:
        run_ours, run_theirs, _ = calls(ours, theirs, length, rows)
        run_ours()
        before = best_seconds(run_ours)
        if length == ALONE:
            if length not in alone:
                alone[length] = best_seconds(calls(ours, theirs, length, 1)[1])
            their_seconds = rows * alone[length]
        else:
            run_theirs()
            their_seconds = best_seconds(run_theirs)
        seconds = min(before, best_seconds(run_ours))
        share = rows * training_flops(config, [length]) / seconds / rate
        operators = operators_of(run_ours) if rows * length <= 2048 else 0
        yield Cell(hidden, experts, length, rows, seconds, their_seconds, share, operators)


def table_of(cells: list[Cell]) -> Table:
    """Returns a table with a line for each cell."""
    table = Table(title="forward and backward, fp32, compared with transformers")
    for column in ("hidden", "experts", "row length", "rows", "ours, tokens/s", "transformers"):
        table.add_column(column, justify="right")
    for column in ("ratio", "share of matmul rate", "operators"):
        table.add_column(column, justify="right")
    for cell in cells:
        tokens = cell.rows * cell.length
        table.add_row(
            *map(str, (cell.hidden, cell.experts, cell.length, cell.rows)),
            f"{tokens / cell.seconds:,.0f}",
            f"{tokens / cell.their_seconds:,.0f}",
            f"{cell.ratio:.1f}x",
            f"{cell.share:.0%}",
            f"{cell.operators:,}" if cell.operators else "",
        )
    return table


def summary(cells: list[Cell]) -> list[str]:
    """Returns the best and the worst ratio of each row length, and the least share."""
    lines = []
    for length in sorted({cell.length for cell in cells}):
        group = sorted((c for c in cells if c.length == length), key=lambda cell: cell.ratio)
        worst, best = group[0], group[-1]
        wanted, least = WANTED[length]
        lines.append(
            f"rows of {length}: worst {worst.ratio:.1f}x (hidden {worst.hidden}, "
            f"{worst.experts} experts, rows {worst.rows}), best {best.ratio:.1f}x (hidden "
            f"{best.hidden}, {best.experts} experts, rows {best.rows}); wanted {wanted}x, "
            f"at least {least}x"
        )
    widest = max(cell.hidden for cell in cells)
    share = min(cell.share for cell in cells if cell.hidden == widest)
    lines.append(f"hidden {widest}: at least {share:.0%} of the matmul rate")
    return lines


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("small", "full"), default="full")
    parser.add_argument("--lengths", type=int, nargs="+", choices=LENGTHS, help="rows to measure")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    full = (HIDDEN, EXPERTS, LENGTHS, ROWS)
    hidden_sizes, experts, lengths, rows = full if arguments.size == "full" else SMALL
    lengths = arguments.lengths or lengths
    base = load_config("configs/debug.yaml").model
    rates, cells = [matmul_rate()], []
    for hidden, count in itertools.product(hidden_sizes, experts):
        sizes = list(itertools.product(lengths, rows))
        for cell in measure(base, hidden, count, sizes, max(rates)):
            cells.append(cell)
            console.print(
                f"hidden {hidden}, {count} experts, {cell.rows} x {cell.length}: {cell.ratio:.1f}x"
            )
        gc.collect()
        rates.append(matmul_rate())
    console.print(table_of(cells))
    for line in summary(cells):
        console.print(line)
    console.print(
        f"{arguments.threads} threads; fp32 matmul rate between measurements: "
        f"{', '.join(f'{rate / 1e9:.0f}' for rate in rates)} GFLOP/s"
    )


if __name__ == "__main__":
    main()
