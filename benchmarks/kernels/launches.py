"""Launches, bytes and FLOPs of a microbatch and of an update, counted without a GPU.

    python -m benchmarks.kernels.launches [--config CONFIG] [key=value ...]

All kernels are on unless `kernels` is set. The engine of a run takes steps on the fake GPU of
tests/fake_gpu, whose tensors have shapes only; a microbatch is what a step of two takes more than a
step of one.
An operator counts as one launch, also where it takes several (a sort), and multi-tensor operators
as many as their tensors and elements ask for; views and allocations count as none. Bytes are those
of all inputs and outputs of every operator and Triton kernel, read and written once; a kernel that
reads an input several times, or only picked rows of it, moves more or fewer.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from tests.fake_gpu.guard import load
from tests.fake_gpu.report import Report

ROOT = Path(__file__).parents[2]


def counted(path: Path, overrides: list[str]) -> tuple[Report, Report]:
    """Returns the reports of one microbatch, forward and backward, and of an update."""
    load()  # before torch
    from tests.fake_gpu.setup import fake_gpu

    with fake_gpu() as gpu:
        return counted_on(gpu, path, overrides)


def counted_on(gpu: Any, path: Path, overrides: list[str]) -> tuple[Report, Report]:
    """Returns the same in a process that has its fake GPU already."""
    import torch

    from trainer.build import build_native
    from trainer.config import load_config
    from trainer.engine import NativeEngine
    from trainer.parallel.grid import Grid

    config = load_config(path, overrides)
    one, two, update = Report(), Report(), Report()
    grid = Grid.single(torch.device("cuda", 0))
    without_values()
    local, optimizer = build_native(config, grid)
    engine = NativeEngine(local, grid, optimizer)
    batch = pinned_batch(config)
    engine.forward_backward([batch])  # makes the gradients
    with gpu.reporting(one):
        losses = engine.forward_backward([batch])
    with gpu.reporting(two):
        engine.forward_backward([batch, batch])
    with gpu.reporting(update):
        engine.step(1e-6, engine.gradient_norm())
        local.model.update_router_bias(losses.expert_load)
    microbatch = Report(
        operations=two.operations - one.operations,
        launches=two.launches - one.launches,
        matmul_flops=two.matmul_flops - one.matmul_flops,
        bytes=two.bytes - one.bytes,
    )
    return microbatch, update


def without_values() -> None:
    """Weights keep their shapes; nothing is drawn."""
    from model import V4Model

    V4Model.init_weights = lambda *args, **kwargs: None  # type: ignore[method-assign]


def pinned_batch(config: Any) -> Any:
    """A microbatch of the config's sizes, its rows packed with samples of random lengths."""
    import numpy as np
    import torch

    from data import Batch

    length, rows = config.segment.seq_len, config.data.micro_batch_size
    generator = np.random.default_rng(0)

    def packed() -> list[int]:
        lengths: list[int] = []
        while (left := length - sum(lengths)) > 0:
            lengths.append(min(int(generator.lognormal(6.2, 1.1)) + 1, left))
        return lengths

    tokens = torch.randint(3, config.model.vocab_size, (rows, length + 1)).to(torch.int64)
    inputs, targets = (part.contiguous().pin_memory() for part in (tokens[:, :-1], tokens[:, 1:]))
    return Batch(inputs, targets, [packed() for _ in range(rows)])


def show(name: str, report: Report, rows: int) -> None:
    """Prints a report's totals and its most frequent launches."""
    flops = ", ".join(
        f"{count / 1e12:.2f} TFLOP of {dtype.removeprefix('torch.')}"
        for dtype, count in report.matmul_flops.most_common()
    )
    print(
        f"{name}: {report.num_launches:,} launches, {report.launches.total():,} of them Triton's; "
        f"{report.bytes / 1e9:,.1f} GB read and written; matmuls by torch: {flops or 'none'}"
    )
    names = Counter({f"triton {n.rpartition('.')[2]}": c for n, c in report.launches.items()})
    for operation, count in (report.operations + names).most_common(rows):
        print(f"  {count:6,} {operation}")


def main() -> None:
    """Prints both counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "nano.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rows", type=int, default=20, help="of the most frequent launches")
    options = parser.parse_args()
    microbatch, update = counted(options.config, ["kernels=triton", *options.overrides])
    show("a microbatch", microbatch, options.rows)
    show("an update", update, options.rows)


if __name__ == "__main__":
    main()
