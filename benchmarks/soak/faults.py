"""What a soak does to a training. Each fault is one function; it repairs what it broke.

A fault returns a word about what it did, or None where it is not possible at this moment.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import random
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from benchmarks.soak.training import Training

Fault = Callable[[Training, random.Random], str | None]
_GET_FLAGS, _SET_FLAGS, _IMMUTABLE = 0x80086601, 0x40086602, 0x10
DISK_BYTES = 20_000
"""To which files may grow on a full disk."""


def kill_rank(training: Training, chance: random.Random) -> str | None:
    """SIGKILL of one rank; torchrun starts all again."""
    ranks = [member for member in training.members() if member.role == "rank"]
    if not ranks:
        return None
    victim = chance.choice(ranks)
    victim.process.kill()
    return f"rank {victim.rank}"


def kill_all(training: Training, chance: random.Random) -> str | None:
    """SIGKILL of the launcher, torchrun, all ranks and their writers."""
    training.kill()
    return "all processes"


def kill_writer(training: Training, chance: random.Random) -> str | None:
    """SIGKILL of the process that writes a rank's checkpoints: a save fails, the run continues."""
    writers = [member for member in training.members() if member.role == "writer"]
    if not writers:
        return None
    victim = chance.choice(writers)
    victim.process.kill()
    return f"of rank {victim.rank}"


def stop_for_a_while(training: Training, chance: random.Random) -> str | None:
    """SIGSTOP of a rank, or of a writer, for seconds."""
    members = [member for member in training.members() if member.role in ("rank", "writer")]
    if not members:
        return None
    victim, seconds = chance.choice(members), chance.uniform(1.0, 6.0)
    with suppress(psutil.NoSuchProcess):
        victim.process.suspend()
        time.sleep(seconds)
        victim.process.resume()
    return f"{victim.role} {victim.rank}, {seconds:.1f} s"


def full_disk(training: Training, chance: random.Random) -> str | None:
    """No file of a rank or a writer can grow for seconds: saves fail, metrics wait in memory."""
    members = [member for member in training.members() if member.role in ("rank", "writer")]
    seconds = chance.uniform(2.0, 6.0)
    if not members:
        return None
    _limit([member.process for member in members], DISK_BYTES)
    time.sleep(seconds)
    _limit([member.process for member in members], psutil.RLIM_INFINITY)
    return f"{seconds:.1f} s"


def _limit(processes: list[psutil.Process], size: int) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.rlimit(psutil.RLIMIT_FSIZE, (size, psutil.RLIM_INFINITY))


def read_only(training: Training, chance: random.Random) -> str | None:
    """The folder of the checkpoints cannot be written for seconds."""
    folder, seconds = training.checkpoints, chance.uniform(2.0, 6.0)
    if not isinstance(folder, Path):
        return None
    try:
        with _locked(folder):
            time.sleep(seconds)
    except OSError:
        return None
    return f"{seconds:.1f} s"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Makes a folder immutable: permissions do not stop root."""
    mode = folder.stat().st_mode
    if os.geteuid() == 0:
        _set_immutable(folder, True)
    else:
        folder.chmod(0o555)
    try:
        yield
    finally:
        if os.geteuid() == 0:
            _set_immutable(folder, False)
        else:
            folder.chmod(mode)


def _set_immutable(folder: Path, value: bool) -> None:
    handle, flags = os.open(folder, os.O_RDONLY), array.array("l", [0])
    try:
        fcntl.ioctl(handle, _GET_FLAGS, flags, True)
        flags[0] = flags[0] | _IMMUTABLE if value else flags[0] & ~_IMMUTABLE
        fcntl.ioctl(handle, _SET_FLAGS, flags)
    finally:
        os.close(handle)


def make_writable(folder: Path) -> None:
    """Undoes `read_only` where the soak itself was killed during one."""
    if os.geteuid() == 0 and folder.is_dir():
        with suppress(OSError):
            _set_immutable(folder, False)


def clock_jumps(training: Training, chance: random.Random) -> str | None:
    """The clock of all processes is hours wrong from now on."""
    hours = chance.uniform(-48.0, 48.0)
    (training.folder.parent / "clock").write_text(f"{3600 * hours}")
    return f"{hours:+.1f} h"


def nan_gradient(training: Training, chance: random.Random) -> str | None:
    """A gradient of one rank becomes NaN once: the run rolls back and takes the steps again."""
    order = training.folder.parent / "nan"
    order.write_text(str(chance.randrange(training.ranks)))
    deadline = time.monotonic() + 30
    while order.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    if order.exists():
        order.unlink(missing_ok=True)
        return None
    return "one element"


def truncate_newest(training: Training, chance: random.Random) -> str | None:
    """SIGKILL of all, and half of a file of the newest checkpoint is gone.

    The training refuses it, naming the one before; the soak does what the sentence says.
    """
    if not isinstance(training.checkpoints, Path) or len(training.published()) < 2:
        return None
    training.kill()
    newest = training.published()[-1]
    assert isinstance(newest, Path)
    path = chance.choice(sorted(newest.glob("*.safetensors")))
    os.truncate(path, path.stat().st_size // 2)
    position = training.log_size()
    training.start()
    assert training.child is not None
    code = training.child.wait(timeout=300)
    error = training.output_since(position)
    if code != 2 or f"{newest} is damaged" not in error or "the previous complete" not in error:
        raise AssertionError(f"exit code {code} for a truncated checkpoint: {error[-2000:]}")
    shutil.rmtree(newest)
    return f"{newest.name}, refused with exit code 2"


def cut_connection(training: Training, chance: random.Random) -> str | None:
    """The storage closes the connection in the middle of the next uploads."""
    if isinstance(training.checkpoints, Path):
        return None
    fault = {"method": "PUT", "path": "step-", "cut": 1000, "times": chance.randint(1, 3)}
    request = urllib.request.Request(
        f"{os.environ['AWS_ENDPOINT_URL']}/faults", json.dumps([fault]).encode()
    )
    urllib.request.urlopen(request, timeout=20).close()
    return f"{fault['times']} uploads"


FAULTS: dict[str, tuple[Fault, int]] = {
    "SIGKILL of a rank": (kill_rank, 6),
    "SIGKILL of all": (kill_all, 4),
    "SIGKILL of a writer": (kill_writer, 2),
    "SIGSTOP for a while": (stop_for_a_while, 2),
    "full disk": (full_disk, 2),
    "read-only folder": (read_only, 1),
    "cut S3 connection": (cut_connection, 3),
    "clock that jumps": (clock_jumps, 1),
    "NaN gradient": (nan_gradient, 2),
    "truncated newest checkpoint": (truncate_newest, 1),
}
"""Faults by name, with how often each is drawn."""
KILLS = {"SIGKILL of a rank", "SIGKILL of all", "truncated newest checkpoint"}
"""Those after which ranks start again."""
