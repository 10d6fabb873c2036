"""Times of the Triton kernels on a GPU, compared with their alternatives.

For Flash's and Pro's widths and rows of several lengths, each operation runs forward and backward
in Triton, eagerly, eagerly under torch.compile, and in FlexAttention where that can express the
same (window and entry ranges; not lists of selected entries). FP8 matmuls are listed with torch's
in bf16 and, for a single matrix, its `scaled_mm`. The table also has the machine's ceilings,
measured in the same run: a large bf16 matmul and a copy. FLOPs and bytes are the minimum that the
mathematics needs; work that an implementation repeats lowers its share. The peak is the memory
that a pass takes in addition to its inputs. Before anything is timed, Triton in bf16 is compared
with the eager version in fp32 (tests/model/kernels/test_gpu.py compares it with float64). The JSON
is rewritten after each row, so that an interrupted run keeps its results.

    python -m benchmarks.kernels.attention [--rows 4096 16384 65536] [--longest] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.kernels import attention_tasks, fp8_tasks, layer_tasks
from benchmarks.kernels.attention_tasks import DEVICE, DTYPE, Task, Work, load
from model import ModelConfig
from model.kernel_choices import operations_of, unsupported_by_triton

CONSOLE = Console()
TOLERANCE, COSINE = 2e-2, 0.999
"""Triton in bf16 against the eager version in fp32: the norm of the difference over that of the
eager result, and the cosine between them."""
CHECKED_ROW = 4096


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of this GPU: bf16 FLOP/s, and bytes copied (read and written) per second."""

    flops: float
    bytes: float


@dataclass
class Result:
    """One row of the table; times in milliseconds, memory in GiB."""

    sizes: str
    row: int
    operation: str
    implementation: str
    part: str
    ms: float | None = None
    tflops: float | None = None
    gbs: float | None = None
    share: float | None = None
    peak_gib: float | None = None
    note: str = ""


def milliseconds(call: Callable[[], object], budget: float = 1500.0) -> float:
    """Returns the median time of a call on the GPU after two warm-ups, within ``budget`` ms."""
    times: list[float] = []
    for number in range(52):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        if number >= 2:
            times.append(start.elapsed_time(stop))
        if sum(times) > budget and len(times) >= 3:
            break
    return statistics.median(times)


def ceilings() -> Ceilings:
    """Measures the rates of a large matmul and a large copy."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE) for _ in range(2))
    flops = 2 * 8192**3 / (milliseconds(lambda: a @ b) / 1e3)
    x = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE).random_()
    y = torch.empty_like(x)
    return Ceilings(flops, 2 * x.numel() / (milliseconds(lambda: y.copy_(x)) / 1e3))


def timed(make: Callable[[], Task], sizes: str, row: int, limit: Ceilings) -> list[Result]:
    """Times forward and backward of every implementation; a failure is noted in its row."""
    try:
        task = make()
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return [Result(sizes, row, "inputs", "triton", "forward", note=first_line(error))]
    results = []
    for name, function in task.implementations.items():
        for part, work in (("forward", task.forward), ("backward", task.backward)):
            if work is None:
                continue
            result = Result(sizes, row, task.name, name, part)
            try:
                _measure(result, function, task.leaves, work, limit)
            except Exception as error:
                result.note = first_line(error)
            results.append(result)
            torch.cuda.empty_cache()
    return results


def first_line(error: Exception) -> str:
    """Returns an error's type and message, short enough for a table."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"


def _measure(
    result: Result,
    function: Callable[..., Tensor],
    leaves: list[Tensor],
    work: Work,
    limit: Ceilings,
) -> None:
    backward = result.part == "backward"
    leaves = [x.detach().requires_grad_(backward) for x in leaves]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = function(*leaves)
    call: Callable[[], object] = lambda: function(*leaves)  # noqa: E731
    if backward:
        grad = torch.randn_like(out)
        call = lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)  # noqa: E731
    result.ms = milliseconds(call)
    seconds = result.ms / 1e3
    result.peak_gib = (torch.cuda.max_memory_allocated() - before) / 2**30
    result.tflops = work.flops / seconds / 1e12
    result.gbs = work.bytes / seconds / 1e9
    floor = max(work.flops / limit.flops, work.bytes / limit.bytes)
    result.share = floor / seconds


def compared(ours: Tensor, theirs: Tensor) -> tuple[str, bool]:
    """Returns the distance of two results as text, and whether it is within the tolerance."""
    if not ours.is_floating_point():
        # Scores are summed in another order, so near ties may be decided differently.
        share = float((ours.sort(1).values == theirs.sort(1).values).float().mean())
        return f"{share:.4f} of the selected entries equal", share >= 1 - TOLERANCE
    a, b = ours.double().flatten(), theirs.double().flatten()
    error = float((a - b).norm() / b.norm())
    cosine = float(torch.dot(a, b) / (a.norm() * b.norm()))
    # A NaN fails both comparisons.
    return f"error {error:.1e}, cosine {cosine:.6f}", error <= TOLERANCE and cosine > COSINE


def check(task: Task) -> list[str]:
    """Lists where Triton's outputs or gradients differ from the eager version's in fp32."""
    failures = []
    for name in [name for name in task.implementations if name.startswith("triton")]:
        pair = []
        for function, dtype in (
            (task.implementations[name], DTYPE),
            (task.implementations["eager"], torch.float32),
        ):
            leaves = [x.detach().to(dtype if x.dtype == DTYPE else x.dtype) for x in task.leaves]
            if task.backward is not None:
                leaves = [x.requires_grad_() for x in leaves]
            out = function(*leaves)
            if not out.requires_grad:
                pair.append([out])
                continue
            torch.manual_seed(1)
            (out.float() * torch.randn(out.shape, device=DEVICE)).sum().backward()
            pair.append([out.detach(), *[x.grad for x in leaves]])
        for number, (ours, theirs) in enumerate(zip(*pair, strict=True)):
            distance, fine = compared(ours, theirs)
            line = f"{task.name}, {name}, result {number}: {distance}"
            CONSOLE.print(f"  {line}")
            if not fine:
                failures.append(line)
    return failures


def tasks(config: ModelConfig, row: int) -> list[Callable[[], Task]]:
    """Returns functions that make the tasks, since only one at a time fits in memory."""
    modules = (attention_tasks, layer_tasks, fp8_tasks)
    return [make for module in modules for make in module.tasks(config, row)]


def show(results: list[Result], limit: Ceilings) -> None:
    """Prints the table."""
    title = (
        f"{torch.cuda.get_device_name()}: {limit.flops / 1e12:.0f} TFLOP/s in a bf16 "
        f"matmul, {limit.bytes / 1e9:.0f} GB/s in a copy"
    )
    table = Table(title=title)
    for heading in ("sizes", "row", "operation", "implementation", "part"):
        table.add_column(heading)
    for heading in ("ms", "TFLOP/s", "GB/s", "of ceiling", "peak GiB"):
        table.add_column(heading, justify="right")
    table.add_column("note")
    for r in results:
        name = [r.sizes, str(r.row), r.operation, r.implementation, r.part]
        if r.ms is None:
            table.add_row(*name, *[""] * 5, r.note)
            continue
        table.add_row(
            *name,
            f"{r.ms:.3f}",
            f"{r.tflops:.0f}",
            f"{r.gbs:.0f}",
            f"{r.share:.0%}",
            f"{r.peak_gib:.2f}",
        )
    CONSOLE.print(table)


def save(path: Path, record: dict[str, Any]) -> None:
    """The file appears whole or stays as it was."""
    aside = path.with_name(path.name + ".new")
    with aside.open("w") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def main() -> int:
    """Compares, then measures; rewrites the JSON after every row length."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["flash", "pro"])
    parser.add_argument("--rows", nargs="+", type=int, default=[4096, 16384, 65536])
    parser.add_argument("--longest", action="store_true", help="double the row while it fits")
    parser.add_argument("--json", type=Path, default=Path("attention.json"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a GPU, and torch sees none.", file=sys.stderr)
        return 2
    limit = ceilings()
    results: list[Result] = []
    failures: list[str] = []
    record: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    record |= {"ceilings": asdict(limit), "failures": failures}
    for sizes in arguments.sizes:
        config = load(sizes)
        operations = operations_of(config, in_fp8=True)
        reasons = unsupported_by_triton(config, torch.device(DEVICE), DTYPE, operations)
        for name, reason in reasons.items():
            CONSOLE.print(f"{sizes}: {name}: {reason}")
        for make in tasks(config, CHECKED_ROW):
            failures += check(make())
        rows = list(arguments.rows)
        while rows:
            row = rows.pop(0)
            new = [
                result for make in tasks(config, row) for result in timed(make, sizes, row, limit)
            ]
            results += new
            save(arguments.json, record | {"results": [asdict(r) for r in results]})
            fits = all(r.ms is not None for r in new if r.implementation == "triton")
            if arguments.longest and not rows and fits and row < config.max_position_embeddings:
                rows.append(2 * row)
    show(results, limit)
    for line in failures:
        CONSOLE.print(f"[red]outside the tolerance: {line}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
