"""Times of attention, indexer, its loss and compressor on a GPU, beside what they compete with.

For Flash's and Pro's widths and rows of several lengths, each operation runs forward and backward
as Triton, as the plain PyTorch reference, as the reference under torch.compile, and as
FlexAttention where that can say the same (window and entry ranges; not lists of picks). Beside the
times stand the machine's own ceilings, measured in the same run: a large bf16 matrix product and a
copy. Operations and bytes are the fewest that the mathematics needs; what an implementation does
twice lowers its share. The peak is what a pass takes beyond its inputs. Before anything is timed,
Triton in bf16 is compared with the reference in fp32 (tests/model/kernels/test_gpu.py compares it
with float64). The JSON is written anew after every row, so that a run cut short keeps what it has.

    python benchmarks/attention.py [--rows 4096 16384 65536] [--longest] [--json FILE]
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

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor

from model import ModelConfig, SampleLayout
from model.kernel_choices import kernel_choices
from model.kernels.attention import reference_attention, reference_entry_mass
from model.kernels.compressor import reference_pool_windows
from model.kernels.indexer import reference_select_topk
from model.kernels.indexer_loss import reference_indexer_loss
from model.positions import Positions

CONSOLE = Console()
DEVICE, DTYPE = "cuda", torch.bfloat16
TOLERANCE, COSINE = 2e-2, 0.999
"""Triton in bf16 against the reference in fp32: the norm of the difference beside the reference's,
and the cosine between them."""
CHECKED_ROW = 4096
REFERENCE_ROWS, COMPILED_ROWS = 65536, 4096
"""The reference loops on the host, and the compiler unrolls the loop: neither is timed on longer
rows."""


@dataclass(frozen=True)
class Ceilings:
    """What this GPU shows: bf16 operations and bytes copied (read and written) per second."""

    operations: float
    bytes: float


@dataclass(frozen=True)
class Work:
    """The fewest operations and bytes of one pass."""

    operations: float
    bytes: float


@dataclass(frozen=True)
class Task:
    """One operation at one size: its differentiable inputs, and implementations by name."""

    name: str
    leaves: list[Tensor]
    implementations: dict[str, Callable[..., Tensor]]
    forward: Work
    backward: Work | None


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
    """Median time of a call on the GPU after two warm-ups, within about ``budget`` ms."""
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
    """Measured, not read from a data sheet."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE) for _ in range(2))
    operations = 2 * 8192**3 / (milliseconds(lambda: a @ b) / 1e3)
    x = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE).random_()
    y = torch.empty_like(x)
    return Ceilings(operations, 2 * x.numel() / (milliseconds(lambda: y.copy_(x)) / 1e3))


def load(name: str) -> ModelConfig:
    path = Path(__file__).parents[1] / "configs" / f"{name}.yaml"
    return ModelConfig(**yaml.safe_load(path.read_text())["model"])


def randn(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def references(reference: Callable[..., Tensor], row: int) -> dict[str, Callable[..., Tensor]]:
    """The reference as it stands and compiled, where the row is not too long for them."""
    found: dict[str, Callable[..., Tensor]] = {}
    if row <= REFERENCE_ROWS:
        found["reference"] = reference
    if row <= COMPILED_ROWS:
        found["reference, compiled"] = torch.compile(reference)
    return found


def attention_task(config: ModelConfig, kind: Any, row: int) -> Task:
    """Core attention of one layer type on one row that is one sample."""
    from model.kernels import attention_triton

    positions = Positions(config, SampleLayout.from_lengths([[row]], device=DEVICE))
    ranges, rotation = positions.ranges(kind), positions.rotation(kind)
    heads, dim, window = config.num_attention_heads, config.head_dim, config.sliding_window
    leaves = [randn(row, heads, dim), randn(row, dim), randn(heads, dtype=torch.float32)]
    seen = np.minimum(np.arange(row) + 1, window).astype(float)
    selected = None
    if kind != "window":
        visible = np.asarray(ranges.host_entry_end_T) - np.asarray(ranges.host_entry_start_T)
        leaves.insert(2, randn(row // config.compress_ratio(kind), dim))
        if kind == "csa" and visible.max() > config.index_topk:
            selected = random_choice(ranges.entry_end_T, row, config.index_topk)
            visible = np.minimum(visible, config.index_topk)
        seen += visible
    eps = config.rms_norm_eps

    def operands(q: Tensor, kv: Tensor, *rest: Tensor) -> tuple[Any, ...]:
        entries = rest[0] if len(rest) == 2 else None
        return q, kv, entries, rest[-1], rotation, ranges, selected

    def triton(deterministic: bool) -> Callable[..., Tensor]:
        return lambda *x: attention_triton.attention(
            *operands(*x), norm_eps=eps, deterministic=deterministic
        )[0]

    def reference(*x: Tensor) -> Tensor:
        return reference_attention(*operands(*x), window=window, norm_eps=eps)[0]

    implementations: dict[str, Callable[..., Tensor]] = {"triton": triton(True)}
    if selected is not None:
        implementations["triton, atomics"] = triton(False)
    implementations |= references(reference, row)
    if selected is None:
        implementations["flex"] = flex(config, kind, row)
    pairs = heads * dim * float(seen.sum())
    moved = 2.0 * leaves[0].numel() * leaves[0].element_size()
    forward, backward = Work(4 * pairs, moved), Work(10 * pairs, 2 * moved)
    return Task(f"attention, {kind}", leaves, implementations, forward, backward)


def mass_task(config: ModelConfig, row: int) -> Task:
    """The indexer's teacher over the first block of entries, at most 4096 of them."""
    from model.kernels import attention_triton

    positions = Positions(config, SampleLayout.from_lengths([[row]], device=DEVICE))
    ranges, rotation = positions.ranges("csa"), positions.rotation("csa")
    heads, dim = config.num_attention_heads, config.head_dim
    leaves = [randn(row, heads, dim), randn(row // config.csa_compress_ratio, dim)]
    lse = torch.full((row, heads), 12.0, device=DEVICE)
    block = {"norm_eps": config.rms_norm_eps, "stop": min(len(leaves[1]), 4096)}
    visible = np.asarray(ranges.host_entry_end_T) - np.asarray(ranges.host_entry_start_T)
    pairs = heads * dim * float(np.minimum(visible, block["stop"]).sum())
    implementations: dict[str, Callable[..., Tensor]] = {
        "triton": lambda q, e: attention_triton.entry_mass(q, e, lse, rotation, ranges, **block)
    }
    implementations |= references(
        lambda q, e: reference_entry_mass(q, e, lse, rotation, ranges, **block), row
    )
    moved = leaves[0].numel() * 2.0 + row * block["stop"] * 4
    return Task("entries' mass", leaves, implementations, Work(2 * pairs, moved), None)


def random_choice(end_T: Tensor | None, row: int, k: int) -> Tensor:
    """k entries of those each query sees, drawn at random, or all where it sees no more."""
    assert end_T is not None
    out = torch.full((row, k), -1, dtype=torch.int32, device=DEVICE)
    for rows in torch.arange(row, device=DEVICE).split(1024):
        end = end_T[rows, None]
        order = torch.rand(len(rows), max(int(end.max()), k), device=DEVICE)
        order.masked_fill_(torch.arange(order.shape[1], device=DEVICE) >= end, -1)
        best = order.topk(k)
        out[rows] = best.indices.masked_fill(best.values < 0, -1).int()
    return out


def flex(config: ModelConfig, kind: Any, row: int) -> Callable[..., Tensor]:
    """FlexAttention over tokens and entries in one array; without norm and rotation of queries.

    The sink is applied afterwards, through the log-sum-exp that FlexAttention returns.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window = config.sliding_window
    ratio = 0 if kind == "window" else config.compress_ratio(kind)
    count = row + (row // ratio if ratio else 0)

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        token = (s <= t) & (s > t - window)
        if not ratio:
            return token
        return torch.where(s < row, token, s - row < (t + 1) // ratio)

    compiled = torch.compile(flex_attention)
    masks: list[Any] = []

    def call(q: Tensor, kv: Tensor, *rest: Tensor) -> Tensor:
        if not masks:  # compiled, or the whole [row, count] would be written on the way
            made = create_block_mask(sees, None, None, row, count, device=DEVICE, _compile=True)
            masks.append(made)
        keys = torch.cat([kv, rest[0]]) if ratio else kv
        keys = keys[None, None]
        queries = q.transpose(0, 1)[None]
        out, lse = compiled(
            queries, keys, keys, block_mask=masks[0], enable_gqa=True, return_lse=True
        )
        share = torch.sigmoid(lse - rest[-1][None, :, None])
        return (out * share[..., None]).to(q.dtype)[0].transpose(0, 1)

    return call


def indexer_task(config: ModelConfig, row: int) -> Task:
    from model.kernels import indexer_triton

    ranges = Positions(config, SampleLayout.from_lengths([[row]], device=DEVICE)).ranges("csa")
    heads, dim, k = config.index_n_heads, config.index_head_dim, config.index_topk
    inputs = [randn(row, heads, dim), randn(row // config.csa_compress_ratio, dim)]
    inputs.append(randn(row, heads, dtype=torch.float32))
    visible = np.asarray(ranges.host_entry_end_T) - np.asarray(ranges.host_entry_start_T)
    pairs = float(visible[visible > k].sum())
    moved = inputs[0].numel() * 2.0 + inputs[2].numel() * 4 + row * k * 4
    implementations: dict[str, Callable[..., Tensor]] = {
        "triton": lambda *x: indexer_triton.select_topk(*x, ranges, k)
    }
    implementations |= references(lambda *x: reference_select_topk(*x, ranges, k), row)
    work = Work(2 * heads * dim * pairs, moved)
    return Task("indexer", inputs, implementations, work, None)


def indexer_loss_tasks(config: ModelConfig, row: int) -> list[Callable[[], Task]]:
    return [lambda k=k: indexer_loss_task(config, row, k) for k in (None, config.index_topk)]


def indexer_loss_task(config: ModelConfig, row: int, k: int | None) -> Task:
    """The indexer's objective over all entries or over k of them, its teacher a tensor of ones.

    The teacher has a row of the table of its own, "entries' mass".
    """
    ranges = Positions(config, SampleLayout.from_lengths([[row]], device=DEVICE)).ranges("csa")
    heads, dim = config.index_n_heads, config.index_head_dim
    leaves = [randn(row, heads, dim), randn(row // config.csa_compress_ratio, dim)]
    leaves.append(randn(row, heads, dtype=torch.float32) * (heads * dim) ** -0.5)
    visible = np.asarray(ranges.host_entry_end_T) - np.asarray(ranges.host_entry_start_T)
    selected = None if k is None else random_choice(ranges.entry_end_T, row, k)
    pairs = float(visible.sum() if k is None else np.minimum(visible, k).sum())

    def mass(rows: slice, columns: slice) -> Tensor:
        return torch.ones(rows.stop - rows.start, columns.stop - columns.start, device=DEVICE)

    def triton(*x: Tensor) -> Tensor:
        from model.kernels import indexer_loss_triton

        return indexer_loss_triton.indexer_loss(*x, mass, ranges, selected)

    implementations: dict[str, Callable[..., Tensor]] = {"triton": triton}
    implementations |= references(
        lambda *x: reference_indexer_loss(*x, mass, ranges, selected), row
    )
    moved = leaves[0].numel() * 2.0 + leaves[2].numel() * 4 + 4 * pairs
    forward = Work(2 * heads * dim * pairs, moved)
    backward = Work(6 * heads * dim * pairs, 2 * moved)
    form = "dense" if k is None else "selected"
    return Task(f"indexer loss, {form}", leaves, implementations, forward, backward)


def compressor_task(config: ModelConfig, kind: Any, row: int) -> Task:
    from model.kernels import compressor_triton

    m = config.compress_ratio(kind)
    entries = SampleLayout.from_lengths([[row]], device=DEVICE).entries(m)
    where = (entries.first_token_C, entries.has_previous_C, kind == "csa")
    width = config.head_dim * (2 if kind == "csa" else 1)
    leaves = [randn(row, width), randn(row, width), randn(m, width, dtype=torch.float32)]
    pooled = row / m * config.head_dim * 4
    moved = 2.0 * row * width * 2
    implementations: dict[str, Callable[..., Tensor]] = {
        "triton": lambda *x: compressor_triton.pool_windows(*x, *where)
    }
    # It has no loop, so that the row's length changes nothing.
    implementations |= references(lambda *x: reference_pool_windows(*x, *where), 0)
    forward = Work(5.0 * row * width, moved + pooled)
    backward = Work(10.0 * row * width, 2 * moved + pooled)
    return Task(f"compressor, {kind}", leaves, implementations, forward, backward)


def timed(make: Callable[[], Task], sizes: str, row: int, limit: Ceilings) -> list[Result]:
    """Forward and backward of every implementation; one that fails says so in its row."""
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
    """What went wrong, short enough for a table."""
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
    result.tflops = work.operations / seconds / 1e12
    result.gbs = work.bytes / seconds / 1e9
    floor = max(work.operations / limit.operations, work.bytes / limit.bytes)
    result.share = floor / seconds


def compared(ours: Tensor, theirs: Tensor) -> tuple[str, bool]:
    """How far two results are apart, and whether that is near enough."""
    if not ours.is_floating_point():
        # Scores are summed in another order, so that near ties may fall otherwise.
        share = float((ours.sort(1).values == theirs.sort(1).values).float().mean())
        return f"{share:.4f} of the choices equal", share >= 1 - TOLERANCE
    a, b = ours.double().flatten(), theirs.double().flatten()
    error = float((a - b).norm() / b.norm())
    cosine = float(torch.dot(a, b) / (a.norm() * b.norm()))
    # NaN is neither.
    return f"error {error:.1e}, cosine {cosine:.6f}", error <= TOLERANCE and cosine > COSINE


def check(task: Task) -> list[str]:
    """Where Triton's outputs or gradients leave the reference's in fp32."""
    wrong = []
    for name in [name for name in task.implementations if name.startswith("triton")]:
        pair = []
        for function, dtype in (
            (task.implementations[name], DTYPE),
            (task.implementations["reference"], torch.float32),
        ):
            leaves = [
                x.detach().to(dtype if x.dtype == DTYPE else x.dtype).requires_grad_()
                for x in task.leaves
            ]
            out = function(*leaves)
            if not out.requires_grad:
                pair.append([out])
                continue
            torch.manual_seed(1)
            (out.float() * torch.randn(out.shape, device=DEVICE)).sum().backward()
            pair.append([out.detach(), *[x.grad for x in leaves]])
        for number, (ours, theirs) in enumerate(zip(*pair, strict=True)):
            told, fine = compared(ours, theirs)
            line = f"{task.name}, {name}, result {number}: {told}"
            CONSOLE.print(f"  {line}")
            if not fine:
                wrong.append(line)
    return wrong


def tasks(config: ModelConfig, row: int) -> list[Callable[[], Task]]:
    """Made one at a time, because one at a time fits in memory."""
    made: list[Callable[[], Task]] = []
    for kind in sorted({"window", *config.layer_types}):
        made.append(lambda kind=kind: attention_task(config, kind, row))
    made.append(lambda: mass_task(config, row))
    made.append(lambda: indexer_task(config, row))
    made += indexer_loss_tasks(config, row)
    for kind in ("csa", "hca"):
        made.append(lambda kind=kind: compressor_task(config, kind, row))
    return made


def show(results: list[Result], limit: Ceilings) -> None:
    title = (
        f"{torch.cuda.get_device_name()}: {limit.operations / 1e12:.0f} TFLOP/s in a bf16 matrix "
        f"product, {limit.bytes / 1e9:.0f} GB/s in a copy"
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
    wrong: list[str] = []
    record: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    record |= {"ceilings": asdict(limit), "wrong": wrong}
    for sizes in arguments.sizes:
        config = load(sizes)
        for name, choice in kernel_choices(config, torch.device(DEVICE), DTYPE).items():
            CONSOLE.print(f"{sizes}: {name} uses {choice}")
        for make in tasks(config, CHECKED_ROW):
            wrong += check(make())
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
    for line in wrong:
        CONSOLE.print(f"[red]outside the tolerance: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
