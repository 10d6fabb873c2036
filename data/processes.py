"""Other processes of this machine, which may have ended meanwhile."""

import os
from contextlib import suppress
from pathlib import Path

import psutil

_CLOCK_SECONDS = 2.0  # by which a time since 1970 may shift with the clock
_FIRST_DATE = 1e9  # seconds since 1970: a longer time than any since a boot


def birth(pid: int) -> float:
    """Returns when a process was created, in seconds since the boot, which no clock can shift.

    Raises psutil.NoSuchProcess.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def find_process(pid: int, born: float) -> psutil.Process | None:
    """The process with this id that was created then; None if it has ended.

    Arguments:
        born: as `birth` returns it, or in seconds since 1970, as in older files.
    """
    try:
        process = psutil.Process(pid)
        created = process.create_time() if born > _FIRST_DATE else birth(pid)
        if abs(created - born) > (_CLOCK_SECONDS if born > _FIRST_DATE else 0.0):
            return None  # another one has the id by now
    except psutil.NoSuchProcess:
        return None
    except (psutil.AccessDenied, PermissionError):
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
