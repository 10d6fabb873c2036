"""Checks kernels on a GPU, each operation in its own process with a time limit.

An illegal access of memory makes a process's GPU unusable until its end, a kernel may hang, and a
compiler may crash: none of this reaches the caller, and the next operation gets a new process. So
do, after a failure, the operation's other candidates: block sizes, and libraries.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NamedTuple

from trainer.files import write_synced
from trainer.kernels.verdict import Problem, Verdict
from trainer.process.exit_codes import describe_signal

SECONDS = 300.0
"""Limit of one operation. Compiling takes most of it, on as many processors as the host has."""
STALL_SECONDS = 100.0
_POLL = 0.2
_GRACE = 10.0
"""Seconds in which a killed process must end; a driver may keep it longer."""
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
"""Signals that no kernel causes. SIGKILL mostly comes from the system when memory runs out."""
WORKER = (sys.executable, "-m", "trainer.kernels.worker")


def check_kernels(
    problem: Problem,
    device_index: int,
    report: Callable[[str], None],
    *,
    seconds: float = SECONDS,
    stall_seconds: float = STALL_SECONDS,
    stopped: Callable[[], bool] = lambda: False,
    worker: Sequence[str] = WORKER,
) -> tuple[Verdict, ...]:
    """Checks each of the problem's operations; see `CheckKernels`.

    Args:
        seconds: limit of one operation.
        stall_seconds: limit of one candidate's run on one case; beyond it, the candidate hangs.
        stopped: whether to end the check at once.
        worker: the command that checks one operation (trainer/kernels/worker.py).
    """
    verdicts = []
    for operation in problem.operations:
        report(operation)
        limits = _Limits(seconds, stall_seconds)
        verdicts.append(_check(operation, problem, device_index, limits, worker, stopped))
    return tuple(verdicts)


def _check(
    operation: str,
    problem: Problem,
    device_index: int,
    limits: _Limits,
    worker: Sequence[str],
    stopped: Callable[[], bool],
) -> Verdict:
    """Runs the worker and returns its verdict, or the reason why there is none.

    Where the worker dies or hangs with a candidate, another one checks the others.
    """
    refused: dict[int, str] = {}
    start, seconds = time.monotonic(), limits.operation
    while True:
        with tempfile.TemporaryDirectory(prefix="v4-kernels-") as folder:
            path, note = Path(folder, "verdict.json"), Path(folder, "note")
            command = [*worker, "--operation", operation, "--device", str(device_index)]
            command += ["--verdict", str(path), "--parent", str(os.getpid()), "--note", str(note)]
            command += ["--refused", json.dumps(refused)]
            with Path(folder, "output").open("w+", errors="replace") as output:
                ended = _run(command, problem, start, limits, output, note, stopped)
            if path.exists():
                return verdict_from_json(path.read_text())
            noted = _read_note(note)
        is_late = time.monotonic() - start >= seconds
        if ended.is_final or is_late or noted is None or noted.candidate in refused:
            # A kernel that hangs would do so at every start; one with less time may pass.
            is_temporary = ended.is_temporary or (is_late and seconds < SECONDS)
            return Verdict(operation, False, ended.reason, "eager", is_temporary=is_temporary)
        refused[noted.candidate] = ended.reason


@dataclass(frozen=True)
class _Ended:
    """How a worker ended: the reason, and whether another one need not be tried."""

    reason: str
    is_final: bool = False
    is_temporary: bool = False


def _run(
    command: list[str],
    problem: Problem,
    start: float,
    limits: _Limits,
    output: IO[str],
    note: Path,
    stopped: Callable[[], bool],
) -> _Ended:
    """Runs a command with the problem as its input; returns how it ended.

    It and its children are ended after the limit, where a candidate stalls, and when the caller is
    interrupted or stopped.
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
    deadline = start + limits.operation
    last, since = None, 0.0
    try:
        while True:
            try:
                process.communicate(given, timeout=max(min(_POLL, deadline - time.monotonic()), 0))
                break
            except subprocess.TimeoutExpired:
                given = None  # written in the first round
            if stopped():
                return _Ended("its check was stopped", is_final=True)
            now = time.monotonic()
            if now >= deadline:
                reason = f"its check took more than {limits.operation:.0f} seconds and was ended"
                return _Ended(reason, is_final=True)
            if (noted := _read_note(note)) != last:
                last, since = noted, now
            if last is not None and last.what == "runs" and now - since >= limits.stall:
                return _Ended(f"it took more than {limits.stall:.0f} seconds and was ended")
    finally:
        _end(process)
    if process.returncode >= 0:
        return _Ended(f"its check failed: {_last_line(output)}")
    if -process.returncode not in _FROM_OUTSIDE:
        return _Ended(f"its check {describe_signal(process.returncode)}")
    name = signal.Signals(-process.returncode).name
    advice = "; free memory of the host, or raise the limit of its job or pod"
    reason = f"its check was killed by {name}" + advice * (name == "SIGKILL")
    return _Ended(reason, is_final=True, is_temporary=True)


class _Note(NamedTuple):
    """The candidate that a worker is trying, what that does, and since when."""

    candidate: int
    what: str
    time: int


def _read_note(path: Path) -> _Note | None:
    """Returns the note; None where no candidate is being tried."""
    try:
        number, what = path.read_text().split()
        return _Note(int(number), what, path.stat().st_mtime_ns)
    except (OSError, ValueError):  # being written
        return None


class _Limits(NamedTuple):
    """Seconds of an operation, and of a candidate's run on one case."""

    operation: float
    stall: float


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
