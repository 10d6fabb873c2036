"""The training that a soak disturbs: `v4 train` on several ranks, and what it wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

from data.processes import is_running
from data.storage import AnyPath, as_path
from trainer.checkpoint import checkpoints_in, step_of
from trainer.metrics import Record

INJECTED = Path(__file__).with_name("injected")


@dataclass(frozen=True)
class Member:
    """A process of the training: its role, as `launcher`, `torchrun`, `rank` or `writer`."""

    role: str
    rank: int
    process: psutil.Process


class Training:
    """`v4 train` in a run folder; it may be started again after any end.

    Attributes:
        folder: the run folder; its output is in `log`.
        checkpoints: where its checkpoints are.
        child: the launcher, once it was started.
    """

    def __init__(
        self, soak: Path, name: str, arguments: Sequence[str], ranks: int, checkpoints: str = ""
    ) -> None:
        self.folder, self.log, self.ranks = soak / name, soak / f"{name}.log", ranks
        self.checkpoints: AnyPath = self.folder / "checkpoints"
        if checkpoints:
            self.checkpoints = as_path(checkpoints)
            arguments = [*arguments, f"checkpoint.folder={checkpoints}"]
        options = [f"run_dir={self.folder}", f"--nproc-per-node={ranks}", "--max-restarts=100000"]
        self.command = [sys.executable, "-m", "launch", "train", *arguments, *options]
        self.child: subprocess.Popen[bytes] | None = None
        paths = [str(INJECTED), os.getcwd(), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "SOAK_FOLDER": str(soak),
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
        }

    def start(self) -> None:
        """Starts the launcher."""
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def code(self) -> int | None:
        """Returns the launcher's exit code; None while it runs."""
        return None if self.child is None else self.child.poll()

    def members(self) -> list[Member]:
        """Returns the processes that are there now, the launcher first."""
        if self.child is None or self.child.poll() is not None:
            return []
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.child.pid)
            found = [Member("launcher", 0, launcher)]
            for process in launcher.children(recursive=True):
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    found += _member(process)
            return found
        return []

    def kill(self) -> None:
        """Sends SIGKILL to all processes and waits for their end."""
        processes = [member.process for member in self.members()]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if self.child is not None:
            self.child.wait()
        deadline = time.monotonic() + 30
        while any(map(is_running, processes)) and time.monotonic() < deadline:
            time.sleep(0.05)

    def dump_stacks(self) -> None:
        """Ends ranks and writers so that each writes its threads' stacks into the log."""
        for member in self.members():
            if member.role in ("rank", "writer"):
                with suppress(psutil.NoSuchProcess):
                    member.process.send_signal(signal.SIGABRT)
        time.sleep(3.0)

    def terminate(self) -> None:
        """Asks the launcher to stop the training after a checkpoint."""
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)

    def published(self) -> list[AnyPath]:
        """Returns the published checkpoints, oldest first."""
        return checkpoints_in(self.checkpoints)

    def newest_step(self) -> int:
        """Returns the step of the newest published checkpoint, 0 without any."""
        paths = self.published()
        return step_of(paths[-1]) if paths else 0

    def output_since(self, position: int) -> str:
        """Returns what was logged after this size of the log."""
        if not self.log.is_file():
            return ""
        with self.log.open("rb") as stream:
            stream.seek(position)
            return stream.read().decode(errors="replace")

    def log_size(self) -> int:
        """Returns the size of the log now."""
        return self.log.stat().st_size if self.log.is_file() else 0


def _member(process: psutil.Process) -> list[Member]:
    words = process.cmdline()
    if "trainer.checkpoint.writer_process" in words:
        return [Member("writer", int(process.environ().get("RANK", 0)), process)]
    if "trainer.process.torchrun" in words:
        return [Member("torchrun", 0, process)]
    if "-m" in words and words[words.index("-m") + 1] == "trainer":
        return [Member("rank", int(process.environ().get("RANK", 0)), process)]
    return []


class MetricsReader:
    """Reads every line that a run writes into metrics.jsonl, also those that a resume drops."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._inode = 0
        self._start, self._last = 0, b""  # where the last line begins, and the line

    def new_records(self) -> Iterator[Record]:
        """Yields the records of steps since the last call; all of a file that was replaced."""
        while True:
            yield from self._rest()
            try:
                inode = os.stat(self.path).st_ino
            except OSError:
                return
            if inode == self._inode:
                return
            if self._file is not None:
                self._file.close()
            self._file, self._inode = self.path.open("rb"), inode
            self._start, self._last = 0, b""

    def _rest(self) -> Iterator[Record]:
        """Yields what follows the last line, and that line as well where it was replaced."""
        if self._file is None:
            return
        self._file.seek(self._start)
        if self._file.readline() != self._last:
            self._file.seek(self._start)
        while True:
            position = self._file.tell()
            line = self._file.readline()
            if not line.endswith(b"\n"):
                return
            self._start, self._last = position, line
            record = json.loads(line)
            if "event" not in record:
                yield record
