"""A running trial of a sweep: its process, its lease, and how it is ended."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from data.activity import Activity, print_line
from data.files import write_atomically
from data.lease import Lease, LeaseError, LeaseStopped
from data.processes import birth, find_process
from launch import processes
from launch.sweep_progress import TrialProgress
from trainer.config import RunConfig

POLL_SECONDS = 0.3
_WORKER_FILE = "worker.json"


@dataclass
class Trial:
    """A running trial."""

    number: int
    folder: Path
    process: subprocess.Popen[bytes]
    config: RunConfig
    lease: Lease
    progress: TrialProgress
    history: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def is_unfinished(self) -> bool:
        """Whether it has saved checkpoints, and none of its last step: a signal has ended it."""
        return self.config.has_begun and not self.config.is_complete


def take_lease(folder: Path, patient: bool, is_stopping: Callable[[], bool]) -> Lease | None:
    """Takes the lease of the `v4 sweep` that runs a trial; None where another process has it.

    Arguments:
        patient: whether to wait until it is certain that an owner on another host has died.

    Raises LeaseError where the trial's folder cannot be written.
    """
    lease = Lease(
        folder,
        "v4 sweep",
        name=_WORKER_FILE,
        log=print_line if patient else lambda line: None,
        is_stopped=lambda: is_stopping() or not patient,
    )
    try:
        return lease.__enter__()
    except LeaseStopped:
        return None
    except LeaseError as error:
        if isinstance(error.__cause__, OSError):
            raise
        return None


def start_process(command: Sequence[str], folder: Path, jobs: int) -> subprocess.Popen[bytes]:
    """Starts the command of a trial, with its output in `log.txt`, and writes `process.json`."""
    with open(folder / "log.txt", "ab") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=processes.environment(jobs),
            start_new_session=True,
        )
    record = {"pid": process.pid, "born": birth(process.pid), "folder": str(folder.resolve())}
    write_atomically(folder / "process.json", json.dumps(record))
    return process


def end_trials(trials: Sequence[subprocess.Popen[bytes]], signals: Callable[[], int]) -> None:
    """Asks the processes to save and end, and waits for it; kills them after a second signal."""
    for process in trials:
        process.terminate()
    with Activity("waiting for the trials to save; a second signal kills them"):
        for process in trials:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                if signals() > 1:
                    process.send_signal(signal.SIGQUIT)  # `v4 train` kills its training then


def stop_orphan(folder: Path, is_stopping: Callable[[], bool] = lambda: False) -> None:
    """Terminates the trial that a killed sweep left running; it saves a checkpoint first.

    `is_stopping` ends the wait for it.

    In the copy of a sweep's folder, the process is the original's and goes on.
    """
    path = folder / "process.json"
    if not path.is_file():
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        pid, born = int(known["pid"]), float(known["born"])
        started_in = known.get("folder", str(folder.resolve()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # damaged; the lease on the trial's folder is what keeps two processes apart
    if started_in != str(folder.resolve()):
        return
    process = find_process(pid, born)
    if process is None:
        return
    with suppress(psutil.NoSuchProcess):
        process.terminate()
        with Activity(f"waiting for the earlier process {process.pid} of {folder} to save"):
            while not is_stopping():
                with suppress(psutil.TimeoutExpired):
                    process.wait(POLL_SECONDS)
                    return
