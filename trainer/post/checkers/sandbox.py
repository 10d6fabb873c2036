"""Runs code that nobody has read, within limits: docs/post-training.md says what isolates it."""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from trainer.config.post import SandboxConfig
from trainer.process.errors import PostTrainingError

_SCRIPT = Path(__file__).with_name("confined.py")
_POLL_SECONDS = 0.1
_BLOCK = 4096
_RESULT_BYTES = 1 << 20

Status = Literal["finished", "failed", "timeout", "output", "files", "died"]


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        status: `finished`: code, tests and calls ran to their end. `failed`: the code or its tests
            raised. `timeout`: out of wall time. `output`, `files`: printed or wrote too much.
            `died`: it ended otherwise, as by a signal, the limit of CPU time, or os._exit.
        error: the exception, or the reason.
        values: of the calls: {"value": ...}, or {"error": ...} for one that raised.
        output: the beginning of what it printed.
    """

    status: Status
    error: str = ""
    values: Sequence[dict[str, Any]] = ()
    output: str = ""


@dataclass(frozen=True)
class Program:
    """Code under test.

    Attributes:
        source: Python code.
        tests: code that runs after it in the same namespace, and raises where it is wrong.
        calls: functions to call then, and their arguments, JSON values.
    """

    source: str
    tests: str = ""
    calls: Sequence[tuple[str, Sequence[Any]]] = field(default_factory=tuple)


class Sandbox:
    """Runs programs, each in a process and an empty folder of its own; threads may share it."""

    def __init__(self, config: SandboxConfig) -> None:
        """Raises PostTrainingError for a folder of `readable` that is not there."""
        for path in config.readable:
            if not os.path.isdir(path):
                raise PostTrainingError(f"post.sandbox.readable: {path} is no folder")
        self.config = config

    def check(self) -> None:
        """Runs an empty program.

        Raises PostTrainingError where this machine cannot isolate it.
        """
        outcome = self.run(Program(""))
        if outcome.status != "finished":
            raise PostTrainingError(f"the sandbox does not work: {outcome.error}")

    def run(self, program: Program) -> Outcome:
        """Runs a program to its end, or to a limit.

        Raises PostTrainingError where this machine cannot isolate it.
        """
        with (
            tempfile.TemporaryDirectory(prefix="v4-answer-", ignore_cleanup_errors=True) as folder,
            tempfile.TemporaryFile() as job,
        ):
            key = secrets.token_hex(16)
            job.write(json.dumps(self._job(program, folder, key)).encode())
            job.seek(0)
            return self._run(job, folder, key)

    def _job(self, program: Program, folder: str, key: str) -> dict[str, Any]:
        config = self.config
        return {
            "source": program.source,
            "tests": program.tests,
            "calls": list(program.calls),
            "key": key,
            "parent": os.getpid(),
            "folder": folder,
            "confine": not config.unisolated,
            "readable": [*_python_folders(), *config.readable],
            "limits": {
                "RLIMIT_CPU": config.cpu_seconds,
                "RLIMIT_AS": config.memory,
                "RLIMIT_FSIZE": config.files,
                "RLIMIT_CORE": 0,
                "RLIMIT_NOFILE": 64,
            },
        }

    def _run(self, job: Any, folder: str, key: str) -> Outcome:
        reader, writer = os.pipe()
        with os.fdopen(reader, "rb") as result:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-s", "-S", "-P", str(_SCRIPT), str(writer)],
                    stdin=job,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=[writer],
                    cwd=folder,
                    env=_environment(folder),
                    start_new_session=True,
                )
            finally:
                os.close(writer)
            with process:
                try:
                    streams = _Streams(process, result, self.config.output)
                    stopped = streams.read(folder, self.config)
                finally:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        return _outcome(stopped, streams, process.returncode, key)


def _python_folders() -> list[str]:
    """Python's standard library, the shared libraries of its modules, and what they read."""
    library = sysconfig.get_config_var("LIBDIR")
    paths = [*map(sysconfig.get_path, ("stdlib", "platstdlib")), *([library] if library else [])]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/dev/urandom"]
    return paths + system


def _environment(folder: str) -> dict[str, str]:
    """The whole environment of a program; hashes of strings are the same in every run."""
    return {
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


class _Streams:
    """Reads what a process prints and its result, neither without bound."""

    def __init__(self, process: subprocess.Popen[bytes], result: Any, output_bytes: int) -> None:
        self._limits = {process.stdout: output_bytes, result: _RESULT_BYTES}
        self._data = {process.stdout: bytearray(), result: bytearray()}
        self._printed, self._result = process.stdout, result

    @cached_property
    def output(self) -> str:
        """What was printed."""
        return self._data[self._printed].decode(errors="replace")

    @property
    def result(self) -> bytes:
        """What was written as the result."""
        return bytes(self._data[self._result])

    def read(self, folder: str, config: SandboxConfig) -> tuple[Status, str] | None:
        """Reads until the process closes both; returns the limit that it reached, if any."""
        deadline = time.monotonic() + config.wall_seconds
        next_look = time.monotonic() + _POLL_SECONDS
        with selectors.DefaultSelector() as selector:
            for file in self._limits:
                selector.register(file, selectors.EVENT_READ)
            while selector.get_map():
                now = time.monotonic()
                if now >= deadline:
                    return "timeout", f"it ran longer than {config.wall_seconds:g} s"
                if now >= next_look:
                    if _folder_bytes(folder) > config.files:
                        return "files", f"its files exceed {config.files:,} bytes"
                    next_look = now + _POLL_SECONDS
                for key, _ in selector.select(min(deadline, next_look) - now):
                    stream: Any = key.fileobj
                    data = os.read(stream.fileno(), 1 << 16)
                    if not data:
                        selector.unregister(stream)
                        continue
                    room = self._limits[stream] - len(self._data[stream])
                    self._data[stream] += data[:room]
                    if len(data) > room:
                        return "output", f"it printed more than {self._limits[stream]:,} bytes"
        return None


def _folder_bytes(folder: str) -> int:
    """Returns the bytes of a folder's files; each counts for at least a block."""
    total = 0
    with suppress(OSError), os.scandir(folder) as entries:  # a file may be gone meanwhile
        for entry in entries:
            total += max(entry.stat(follow_symlinks=False).st_size, _BLOCK)
    return total


def _outcome(stopped: tuple[Status, str] | None, streams: _Streams, code: int, key: str) -> Outcome:
    """Reads the result; without the key of this run, code and tests did not reach their end."""
    if stopped is not None:
        return Outcome(*stopped, output=streams.output)
    try:
        result = json.loads(streams.result)
        values, error = list(result.get("values", ())), str(result.get("error", ""))
    except (ValueError, AttributeError, TypeError, RecursionError):
        ended = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return Outcome("died", f"it ended {ended} before its tests did", output=streams.output)
    if "refused" in result:
        raise PostTrainingError(
            f"code under test cannot be isolated on this machine: {result['refused']}; "
            "post.sandbox.unisolated=true runs it with limits alone"
        )
    if result.get("key") != key:
        return Outcome("failed", error, values, streams.output)
    return Outcome("finished", "", values, streams.output)
