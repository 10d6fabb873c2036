"""Writes the section on GPUs of performance.md from the records of `make bench-gpu`.

python docs/write_performance.py: a record is a file in benchmarks/gpu/records.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.record import CheckRecord, GpuRecord, StepRecord

TARGET = Path(__file__).parent / "performance.md"
RECORDS = Path(__file__).parents[1] / "benchmarks" / "gpu" / "records"
BEGIN = "<!-- begin: written by docs/write_performance.py -->"
END = "<!-- end: written by docs/write_performance.py -->"
NONE = "No GPU has been measured. `make bench-gpu SHORT=1` measures one, in minutes.\n"


def section(records: Sequence[GpuRecord]) -> str:
    """Returns the section's text: steps of all GPUs in one table, then the rest of each GPU."""
    if not records:
        return NONE
    return "\n".join([_steps_table(records), *map(_of_gpu, records)])


def _steps_table(records: Sequence[GpuRecord]) -> str:
    lines = [
        "| GPU | date | config, row | `kernels` | tokens/s | MFU | peak GiB | kernels run in "
        "| launches | matmul TFLOP/s | copy GB/s |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for record in records:
        for step in record.steps:
            where = f"{record.platform['name']} | {record.date} | {Path(step.config).name}"
            lines.append(f"| {where}, {step.row} | {step.kernels} | {_figures(step)} |")
    return "\n".join(lines) + "\n"


def _figures(step: StepRecord) -> str:
    peak = "-" if step.peak_gib is None else f"{step.peak_gib:.1f}"
    return " | ".join(
        (
            f"{step.tokens_per_second:,.0f}",
            f"{step.mfu:.1%}",
            peak,
            f"{step.busy:.0%}",
            f"{step.launches:,}",
            f"{step.matmul_flops / 1e12:,.1f}",
            f"{step.copied_bytes / 1e9:,.0f}",
        )
    )


def _of_gpu(record: GpuRecord) -> str:
    platform = record.platform
    parts = [
        f"### {platform['name']}, {record.date}\n",
        f"Capability {platform['capability'] or '-'}, driver {platform['driver']}, torch "
        f"{platform['torch_version']}, CUDA {platform['cuda']}, Triton {platform['triton']}.\n",
    ]
    parts += [f"{part.name}: failed: {part.problem}\n" for part in record.parts if part.problem]
    if record.check:
        parts.append(_check_table(record.check))
    if record.steps:
        parts.append(_longest_table(record.steps[0]))
    return "\n".join(parts)


def _check_table(check: Sequence[CheckRecord]) -> str:
    lines = ["| operation | Triton ms | eager ms | error | choice | why |"]
    lines.append("|---|---:|---:|---:|---|---|")
    for verdict in check:
        times = [verdict.milliseconds.get(name) for name in ("triton", "eager")]
        cells = ["-" if time is None else f"{time:.3f}" for time in times]
        numbers = [x for x in verdict.errors.get("triton", ()) if x is not None]
        error = f"{max(numbers):.1e}" if numbers else "-"
        row = (verdict.operation, *cells, error, verdict.choice, verdict.reason)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _longest_table(step: StepRecord) -> str:
    lines = [f"Longest kernels of a step with `kernels: {step.kernels}`:\n"]
    lines += ["| kernel | calls | ms |", "|---|---:|---:|"]
    lines += [
        f"| `{kernel.name.replace('|', ' ')}` | {kernel.calls:,} | {kernel.milliseconds:.2f} |"
        for kernel in step.longest
    ]
    return "\n".join(lines) + "\n"


def page(text: str, records: Sequence[GpuRecord]) -> str:
    """Returns the page's text with the section in place of the one between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{section(records)}\n{END}{after}"


def read_records() -> list[GpuRecord]:
    """Reads the records, by name. Raises DataError for a file that is none."""
    return [GpuRecord.read(path) for path in sorted(RECORDS.glob("*.json"))]


def main() -> None:
    """Writes the page."""
    text = TARGET.read_text(encoding="utf-8")
    TARGET.write_text(page(text, read_records()), encoding="utf-8")


if __name__ == "__main__":
    main()
