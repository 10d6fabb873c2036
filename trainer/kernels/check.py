"""Checks kernels on a GPU, each operation in a process of its own with a time limit.

An illegal access of memory makes a process's GPU unusable until its end, a kernel may hang, and a
compiler may crash: none of it reaches the caller, and the next operation gets a new process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

from trainer.files import write_synced
from trainer.kernels.verdict import Problem, Verdict
from trainer.process.exit_codes import describe_signal

SECONDS = 300.0
"""Limit of one operation. Compiling takes most of it, on as many processors as the host has."""
_POLL = 0.2
_GRACE = 10.0
"""Seconds in which a killed process must end; a driver may keep it longer."""
WORKER = (sys.executable, "-m", "trainer.kernels.worker")


def check_kernels(
    problem: Problem,
    device_index: int,
    report: Callable[[str], None],
    *,
    seconds: float = SECONDS,
    stopped: Callable[[], bool] = lambda: False,
    worker: Sequence[str] = WORKER,
) -> tuple[Verdict, ...]:
    """Checks each of the problem's operations; see `CheckKernels`.

    Args:
        seconds: limit of one operation.
        stopped: whether to end the check at once.
        worker: the command that checks one operation (trainer/kernels/worker.py).
    """
    verdicts = []
    for operation in problem.operations:
        report(operation)
        verdicts.append(_check(operation, problem, device_index, seconds, worker, stopped))
    return tuple(verdicts)


def _check(
    operation: str,
    problem: Problem,
    device_index: int,
    seconds: float,
    worker: Sequence[str],
    stopped: Callable[[], bool] = lambda: False,
) -> Verdict:
    """Runs the worker and returns its verdict, or the reason why there is none."""
    with tempfile.TemporaryDirectory(prefix="v4-kernels-") as folder:
        path = Path(folder, "verdict.json")
        command = [*worker, "--operation", operation, "--device", str(device_index)]
        with Path(folder, "output").open("w+", errors="replace") as output:
            command += ["--verdict", str(path), "--parent", str(os.getpid())]
            start = time.monotonic()
            reason = _run(command, problem, seconds, output, stopped)
            spent = time.monotonic() - start
        if path.exists():
            return verdict_from_json(path.read_text())
    # A kernel that hangs would do so at every start; one with less time than that may pass.
    is_temporary = seconds < SECONDS and spent >= seconds
    return Verdict(operation, False, reason, "eager", is_temporary=is_temporary)


def _run(
    command: list[str],
    problem: Problem,
    seconds: float,
    output: IO[str],
    stopped: Callable[[], bool],
) -> str:
    """Runs a command with the problem as its input; returns how it ended.

    It and its children are ended after the limit, and when the caller is interrupted or stopped.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    given: str | None = json.dumps(asdict(problem))
    deadline = time.monotonic() + seconds
    try:
        while True:
            try:
                process.communicate(given, timeout=min(_POLL, deadline - time.monotonic()))
                break
            except subprocess.TimeoutExpired:
                given = None  # written in the first round
            if stopped():
                return "its check was stopped"
            if time.monotonic() >= deadline:
                return f"its check took more than {seconds:.0f} seconds and was ended"
    finally:
        _end(process)
    if process.returncode < 0:
        return f"its check {describe_signal(process.returncode)}"
    return f"its check failed: {_last_line(output)}"


def _end(process: subprocess.Popen[str]) -> None:
    """Kills what is left of the process group; does not wait for a driver that keeps it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)


def _last_line(output: IO[str]) -> str:
    """Returns the last line that is not empty: of a traceback, its exception."""
    output.seek(0)
    lines = [line.strip() for line in output if line.strip()]
    return lines[-1][:300] if lines else "no message"


def problem_from_json(text: str) -> Problem:
    """Reads what `json.dumps(asdict(problem))` wrote."""
    fields = json.loads(text)
    fields["operations"] = tuple(fields["operations"])
    fields["matrices"] = tuple((rows, columns) for rows, columns in fields["matrices"])
    return Problem(**fields)


def verdict_from_json(text: str) -> Verdict:
    """Reads what the worker wrote."""
    fields = json.loads(text)
    fields["errors"] = {name: tuple(pair) for name, pair in fields["errors"].items()}
    return Verdict(**fields)


def write_verdict(path: Path, verdict: Verdict) -> None:
    """The file appears whole."""
    aside = path.with_name(path.name + ".new")
    write_synced(aside, json.dumps(asdict(verdict)))
    aside.replace(path)
