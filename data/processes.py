"""Other processes of this machine, which may have ended meanwhile."""

from contextlib import suppress
from pathlib import Path

import psutil

_CLOCK_SECONDS = 2.0  # by which the recorded time of a process's creation may shift with the clock


def find_process(pid: int, born: float) -> psutil.Process | None:
    """The process with this id that was created then (seconds since 1970); None if it has ended."""
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - born) > _CLOCK_SECONDS:
            return None  # another one has the id by now
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return process  # of another user, and there
    return process if is_running(process) else None


def is_running(process: psutil.Process) -> bool:
    """Whether a process has not ended, reaped or not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def send_if_handled(process: psutil.Process, number: int) -> None:
    """Sends a signal to a process that has a handler for it; others would be killed by it."""
    with suppress(OSError, psutil.Error):
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        if int(caught.split()[1], 16) >> (number - 1) & 1:
            process.send_signal(number)
