"""One process at a time works in a folder; an owner that is dead is not waited for."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from data.lease import LEASE_FILE, Lease, LeaseError, LeaseStopped, Owner

HELD = """
import sys, time
from pathlib import Path
from data.lease import Lease
with Lease(Path(sys.argv[1]), "v4 train"):
    print("held", flush=True)
    time.sleep(60)
"""
QUICK = {"renew": 0.1, "stale": 0.8}


def hold(folder: Path) -> subprocess.Popen[str]:
    """Another process with the lease."""
    command = [sys.executable, "-c", HELD, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def of_another_host(folder: Path, **more: object) -> Path:
    """A lease that a process on another host has taken."""
    owner = Owner.current("v4 train", folder, "").model_copy(
        update={"host": "far", "machine": "far 1", "pid": 4711, **more}
    )
    path = folder / LEASE_FILE
    path.write_text(owner.model_dump_json())
    return path


def renewing(path: Path, seconds: float, shift: float = 0.0) -> Callable[[], None]:
    """Starts to renew a lease file as an owner does whose clock is ahead by `shift` seconds."""
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(seconds):
            now = time.time() + shift
            os.utime(path, (now, now))

    thread = threading.Thread(target=renew)
    thread.start()
    return lambda: (stop.set(), thread.join())[0]


def test_a_living_owner_is_named_with_its_age(tmp_path: Path) -> None:
    process = hold(tmp_path)
    try:
        with pytest.raises(LeaseError) as refused, Lease(tmp_path, "v4 train"):
            pass
        message = str(refused.value)
        assert message.startswith(f"{tmp_path}: `v4 train` (process {process.pid} on ")
        assert "was active 0 s ago; wait for its end, or stop it." in message
    finally:
        process.terminate()
        process.wait()


def test_a_killed_owner_on_this_host_is_replaced_at_once(tmp_path: Path) -> None:
    process = hold(tmp_path)
    process.kill()
    time.sleep(0.2)
    start = time.monotonic()
    with Lease(tmp_path, "v4 train"):  # the process is a zombie still
        assert time.monotonic() - start < 5.0
    process.wait()
    assert not list(tmp_path.iterdir())


def test_a_process_id_that_another_program_has_by_now(tmp_path: Path) -> None:
    ours = Owner.current("v4 train", tmp_path, "")
    (tmp_path / LEASE_FILE).write_text(
        ours.model_copy(update={"born": ours.born - 60.0, "token": "0"}).model_dump_json()
    )
    with Lease(tmp_path, "v4 train"):
        pass


@pytest.mark.parametrize("is_old", [False, True])
def test_an_owner_whose_host_sets_its_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_old: bool
) -> None:
    """Its lease stays; one of an earlier version has a time that moves with the clock."""
    with hold(tmp_path) as process:
        try:
            if is_old:
                path = tmp_path / LEASE_FILE
                owner = Owner.model_validate_json(path.read_text())
                born = psutil.Process(process.pid).create_time()
                path.write_text(owner.model_copy(update={"born": born}).model_dump_json())
            else:
                monkeypatch.setattr("psutil._pslinux.boot_time", lambda: 1.0)
            with pytest.raises(LeaseError, match="stop it"), Lease(tmp_path, "v4 train"):
                pass
        finally:
            process.kill()


def test_the_copy_of_a_folder_in_use_is_free(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    with Lease(tmp_path / "original", "v4 train") as original:
        (tmp_path / "copy" / LEASE_FILE).write_bytes(original.path.read_bytes())
        with Lease(tmp_path / "copy", "v4 train"):
            assert original.path.is_file()


def test_a_signal_ends_the_wait(tmp_path: Path) -> None:
    of_another_host(tmp_path)
    start, stopped = time.monotonic(), pytest.raises(LeaseStopped, match="stopped in this wait")
    with stopped, Lease(tmp_path, "v4 train", renew=0.1, stale=60.0, is_stopped=lambda: True):
        pass
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("shift", [-3600.0, 0.0, 3600.0])
def test_another_host_by_its_renewals_whatever_its_clock(tmp_path: Path, shift: float) -> None:
    path = of_another_host(tmp_path)
    lines: list[str] = []
    stop = renewing(path, 0.1, shift)
    try:
        time.sleep(0.2)
        refused = pytest.raises(LeaseError, match=r"process 4711 on far.* s ago")
        with refused, Lease(tmp_path, "v4 train", log=lines.append, **QUICK):
            pass
    finally:
        stop()
    assert len(lines) == 1 and "waiting for up to 1 s" in lines[0]
    start = time.monotonic()
    with Lease(tmp_path, "v4 train", log=lines.append, **QUICK):
        assert time.monotonic() - start >= 2 * QUICK["renew"]


def test_an_owner_that_loses_its_lease_learns_it(tmp_path: Path) -> None:
    with Lease(tmp_path, "v4 train", **QUICK) as lease:
        lease.check()
        of_another_host(tmp_path)
        time.sleep(0.5)
        with pytest.raises(LeaseError, match=r"process 4711 on far.* has taken the folder over"):
            lease.check()
    assert (tmp_path / LEASE_FILE).is_file(), "that of the new owner stays"


def test_a_restart_of_the_same_launch_waits_for_the_end(tmp_path: Path) -> None:
    with Lease(tmp_path, "v4 train", launch="job-7") as first:
        timer = threading.Timer(0.4, first.release)
        timer.start()
        with Lease(tmp_path, "v4 train", launch="job-7", log=lambda line: None, **QUICK):
            timer.join()
        refused = pytest.raises(LeaseError, match="has been working here")
        with Lease(tmp_path, "v4 train", launch="job-7"), refused:
            Lease(tmp_path, "v4 train", launch="job-8").__enter__()


def test_a_restart_on_another_host_takes_over_after_two_renewals(tmp_path: Path) -> None:
    of_another_host(tmp_path, launch="job-7")
    start = time.monotonic()
    with Lease(tmp_path, "v4 train", "job-7", log=lambda line: None, renew=0.1, stale=60.0):
        assert 0.2 <= time.monotonic() - start < 20.0


def test_a_file_without_an_owner_becomes_stale(tmp_path: Path) -> None:
    """A process may die between creating the file and writing it."""
    (tmp_path / LEASE_FILE).write_text("")
    with Lease(tmp_path, "v4 train", log=lambda line: None, **QUICK):
        assert '"pid"' in (tmp_path / LEASE_FILE).read_text()


def test_one_of_many_takes_a_dead_lease(tmp_path: Path) -> None:
    of_another_host(tmp_path)
    os.utime(tmp_path / LEASE_FILE, (0.0, 0.0))
    outcomes: list[str] = []
    done = threading.Barrier(8)

    def take() -> None:
        try:
            with Lease(tmp_path, "v4 train", log=lambda line: None, **QUICK):
                outcomes.append("held")
                done.wait()
        except LeaseError:
            outcomes.append("refused")
            done.wait()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held"] + ["refused"] * 7


def test_a_folder_made_for_a_lease_goes_with_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Lease(tmp_path / "new", "v4 import"):
        raise RuntimeError
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(LeaseError, match=r"cannot write .*file/lease.json: File exists"):
        Lease(tmp_path / "file", "v4 train").__enter__()


def test_a_folder_that_was_moved_is_reported_once(tmp_path: Path) -> None:
    folder, lines = tmp_path / "run", []
    with Lease(folder, "v4 train", log=lines.append, **QUICK) as lease:
        lease.check()
        folder.rename(tmp_path / "moved")
        time.sleep(4 * QUICK["renew"])
        lease.check()
        folder.mkdir()  # as a checkpoint does
        time.sleep(4 * QUICK["renew"])
        lease.check()
    assert len(lines) == 1 and f"{folder} has been moved or removed" in lines[0]
