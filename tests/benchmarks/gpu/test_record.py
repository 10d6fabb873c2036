"""`make bench-gpu`: a part that fails ends no other, and the page has what the JSON has."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.gpu.__main__ import Part, measured, parts_of
from benchmarks.gpu.record import CheckRecord, GpuRecord
from benchmarks.gpu.steps import measure
from data.errors import DataError
from data.processes import is_running
from docs import write_performance
from tests.trainer.tiny import TINY
from trainer.kernels.verdict_file import cache_folder

PLATFORM = {
    "name": "NVIDIA H200",
    "capability": "9.0",
    "processors": 132,
    "driver": "580.65",
    "torch_version": "2.13.0",
    "cuda": "13.0",
    "triton": "3.7.1",
}
START = GpuRecord(date="2026-12-01", short=True, platform=PLATFORM)
VERDICT = CheckRecord(
    operation="attention",
    passed=False,
    reason="needs 263,200 bytes of shared memory, and the GPU has 232,448",
    choice="eager",
    errors={"eager": (1e-3, 2e-3), "triton": (3e-3, None)},
    milliseconds={"eager": 12.5},
)


def test_a_part_that_fails_or_hangs_ends_no_other() -> None:
    parts = [
        Part("check", ("-c", f"print({VERDICT.model_dump_json()!r})"), 60),
        Part("tests", ("-c", "import sys; print('2 failed'); sys.exit(1)"), 60),
        Part("kernels", ("-c", "import time; time.sleep(60)"), 1),
        Part("transformers", ("-c", "print('a table')"), 60),
    ]
    records = list(measured(parts, START))
    assert [len(record.parts) for record in records] == [1, 2, 3, 4]
    check, tests, kernels, last = records[-1].parts
    assert (check.code, check.problem) == (0, "") and records[-1].check == (VERDICT,)
    assert (tests.code, tests.problem) == (1, "2 failed")
    assert kernels.code != 0 and kernels.problem == "ended after 1 s"
    assert (last.problem, last.log) == ("", "a table\n")


def test_the_check_of_a_gpu_and_its_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    part = parts_of(True, "cuda", "configs/nano.yaml", 4096, 32_768)[0]
    assert part.arguments[:2] == ("-m", "benchmarks.gpu.check")
    stub = ("-m", "tests.benchmarks.gpu.check_on_fake_gpu", *part.arguments[2:])
    (record,) = measured([replace(part, arguments=stub)], START)
    assert record.parts[0].problem == ""
    assert len(record.check) == 11 and all(line.passed for line in record.check)
    assert record.check[0].refused == {"compile": "its check failed"}
    assert len([*cache_folder().glob("*.json")]) == 1
    (tmp_path / "record.json").write_text(record.model_dump_json())
    errors = GpuRecord.read(tmp_path / "record.json").check[0].errors
    assert errors == {"eager": (1e-3, 2e-3), "triton": (1e-3, None)}


def test_what_a_part_started_ends_with_it() -> None:
    """As the check's workers, which have sessions of their own."""
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    (record,) = measured([Part("check", ("-c", code), 5)], START)
    assert record.parts[0].problem == "ended after 5 s"
    child = int(record.parts[0].log)
    assert not psutil.pid_exists(child) or not is_running(psutil.Process(child))


def test_a_part_that_prints_no_record_is_a_line() -> None:
    lines = [
        Part("check", ("-c", "print('{\"operation\": 3}')"), 60),
        Part("tests", ("-c", "print('{not JSON}')"), 60),
    ]
    *_, record = measured(lines, START)
    check, tests = record.parts
    assert check.problem.startswith("printed no CheckRecord: operation: ")
    assert tests.problem == "" and record.check == ()


def test_a_step_and_its_row(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(folder=tmp_path))
    step = measure(str(path), "eager", torch.device("cpu"), 48, 96)
    assert (step.micro_tokens, step.choices["attention"]) == (96, "eager")
    assert 0 < step.mfu < 1 and step.tokens_per_second > 0 and step.launches > 100
    assert len(step.longest) == 10
    record = START.model_copy(update={"steps": (step,), "check": (VERDICT,)})
    (tmp_path / "record.json").write_text(record.model_dump_json())
    assert GpuRecord.read(tmp_path / "record.json") == record
    text = write_performance.section([record])
    assert "| NVIDIA H200 | 2026-12-01 | tiny.yaml, 48 | eager | " in text
    assert f"| {step.tokens_per_second:,.0f} | {step.mfu:.1%} | - |" in text
    assert "| attention | - | 12.500 | 3.0e-03 | eager | needs 263,200 bytes" in text
    assert f"| `{step.longest[0].name}` | {step.longest[0].calls:,} |" in text


def test_the_page_is_current() -> None:
    text = write_performance.TARGET.read_text(encoding="utf-8")
    current = write_performance.page(text, write_performance.read_records())
    assert text == current, "python docs/write_performance.py"


def test_a_file_that_is_no_record(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.json"):
        GpuRecord.read(tmp_path / "none.json")
    (tmp_path / "x.json").write_text('{"date": 3}')
    with pytest.raises(DataError, match=r"x\.json is no record of make bench-gpu"):
        GpuRecord.read(tmp_path / "x.json")


def test_without_a_gpu_it_reports_it() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--short"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert run.returncode == 2 and run.stderr.startswith("This benchmark needs a GPU")
