"""Measures a GPU and leaves one JSON: the check of its kernels, and steps of configs/nano.yaml.

Every part runs in a process of its own with a time limit: one that fails is a line in the JSON, and
the others still run. The short form should end within four minutes on an H200. The long form also
runs the tests that need a GPU, steps on longer rows and with torch.compile, times every kernel
(benchmarks/kernels/attention.py), the parts of a step (benchmarks/steps/step_gpu.py), and steps
compared with transformers (benchmarks/steps/train_gpu.py); what these print is in the JSON.

    python -m benchmarks.gpu [--short] [--json FILE] [--device cpu --config configs/debug.yaml]
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import psutil
from pydantic import BaseModel, ValidationError

from benchmarks.gpu.record import CheckRecord, GpuRecord, PartRecord, StepRecord
from data.activity import print_line
from data.errors import first_problem
from data.files import write_atomically
from trainer.kernels.first_check import TOTAL_SECONDS

RECORDS = Path(__file__).parent / "records"
"""Where docs/write_performance.py finds them."""
_LOG_CHARACTERS = 20_000
_END_SECONDS = 10.0
"""For processes that were killed, to end."""
R = TypeVar("R", bound=BaseModel)


@dataclass(frozen=True)
class Part:
    """A command of this project's Python, and the seconds after which it is ended."""

    name: str
    arguments: tuple[str, ...]
    seconds: float


def parts_of(short: bool, device: str, config: str, row: int, micro_tokens: int) -> list[Part]:
    """Returns the parts in the order in which they run."""
    where = (f"--device={device}", f"--config={config}")
    sizes = (f"--row={row}", f"--micro-tokens={micro_tokens}")
    steps = ("-m", "benchmarks.gpu.steps", *where)
    seconds = ("--seconds=120",) if short else ()
    # Where there are no verdicts for a part's sizes, it checks the kernels itself.
    parts = [
        Part("check", ("-m", "benchmarks.gpu.check", *where, *sizes, *seconds), 900),
        Part("steps", (*steps, *sizes, "--kernels=auto"), 300 + TOTAL_SECONDS),
        Part("eager steps", (*steps, *sizes, "--kernels=eager"), 300),
    ]
    if short:
        return parts
    long = (f"--row={4 * row}", f"--micro-tokens={micro_tokens}")
    return [
        *parts,
        Part("steps on long rows", (*steps, *long, "--kernels=auto"), 600 + TOTAL_SECONDS),
        Part("compiled steps", (*steps, *sizes, "--kernels=compile"), 900),
        Part("tests", ("-m", "pytest", "tests", "-q", "-m", "gpu"), 3600),
        Part("kernels", ("-m", "benchmarks.kernels.attention", "--longest"), 7200),
        Part(
            "parts of a step",
            ("-m", "benchmarks.steps.step_gpu", f"--config={config}"),
            900 + TOTAL_SECONDS,
        ),
        Part("transformers", ("-m", "benchmarks.steps.train_gpu", "--longest"), 6 * 3600),
    ]


def run(part: Part) -> tuple[PartRecord, str]:
    """Runs a part; returns how it ended, and its stdout."""
    start = time.monotonic()
    command = [sys.executable, *part.arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        try:
            out, err = process.communicate(timeout=part.seconds)
            problem = ""
        except subprocess.TimeoutExpired:
            _end(process.pid)
            out, err = process.communicate()
            problem = f"ended after {part.seconds:.0f} s"
    if process.returncode and not problem:
        lines = [*out.strip().splitlines(), *err.strip().splitlines()]
        problem = (lines or [f"ended with {process.returncode}"])[-1]
    spent = round(time.monotonic() - start, 1)
    log = "" if part.arguments[1] == "benchmarks.gpu.steps" else out[-_LOG_CHARACTERS:]
    return PartRecord(
        name=part.name, code=process.returncode, seconds=spent, problem=problem, log=log
    ), out


def _end(pid: int) -> None:
    """Kills a process and all that it started, also what has a session of its own.

    Waits until they have ended, since they may hold the GPU's memory until then.
    """
    process = psutil.Process(pid)
    processes = [process, *process.children(recursive=True)]
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(processes[1:], timeout=_END_SECONDS)  # Popen waits for the first


def measured(parts: list[Part], record: GpuRecord) -> Iterator[GpuRecord]:
    """Runs the parts; yields the record after each, so that an interrupted call keeps the rest."""
    for part in parts:
        print_line(f"{part.name}: running, at most {part.seconds / 60:.0f} min", sys.stderr)
        ended, out = run(part)
        update: dict[str, object] = {}
        try:
            if part.name == "check":
                update["check"] = _lines(CheckRecord, out)
            elif part.arguments[1] == "benchmarks.gpu.steps":
                update["steps"] = (*record.steps, *_lines(StepRecord, out))
        except ValidationError as error:
            problem = ended.problem or f"printed no {error.title}: {first_problem(error)}"
            ended = ended.model_copy(update={"problem": problem})
        print_line(f"{part.name}: {ended.problem or 'done'}, {ended.seconds:.0f} s", sys.stderr)
        update["parts"] = (*record.parts, ended)
        record = record.model_copy(update=update)
        yield record


def _lines(kind: type[R], out: str) -> tuple[R, ...]:
    """Returns the records that a part printed, one a line. Raises ValidationError."""
    lines = [line for line in out.splitlines() if line.startswith("{")]
    return tuple(kind.model_validate_json(line) for line in lines)


def main() -> int:
    """Measures, writes the JSON after every part, and prints where it is; 1 if a part failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--short", action="store_true", help="within four minutes")
    parser.add_argument("--json", type=Path, help="by default benchmarks/gpu/records/GPU-DATE.json")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--config", default="configs/nano.yaml")
    parser.add_argument("--row", type=int, default=4096)
    parser.add_argument("--micro-tokens", type=int, default=32_768)
    options = parser.parse_args()
    import torch

    from benchmarks.steps.machine import device_of
    from trainer.kernels import Platform

    device = device_of(options.device)
    if device is None:
        return 2
    platform = Platform.of(torch.device(device.type, 0) if device.type == "cuda" else device)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    start = GpuRecord(date=date, short=options.short, platform=asdict(platform))
    name = re.sub(r"[^A-Za-z0-9]+", "-", platform.name).strip("-")
    path = options.json or RECORDS / f"{name}-{date}.json"
    sizes = (options.config, options.row, options.micro_tokens)
    failed: list[str] = []
    for record in measured(parts_of(options.short, options.device, *sizes), start):
        write_atomically(path, record.model_dump_json(indent=1) + "\n")
        failed = [part.name for part in record.parts if part.problem]
    print(f"wrote {path}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
