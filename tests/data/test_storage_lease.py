"""The lease on a folder in object storage."""

import subprocess
import sys
import threading
import time

import pytest

from data import lease_file
from data.lease import LEASE_FILE, Lease, LeaseError, Owner
from data.storage import StoragePath
from tests.s3 import S3Server

QUICK = {"renew": 0.3, "stale": 1.5}
HELD = """
import sys, time
from data.lease import Lease
from data.storage import as_path
with Lease(as_path(sys.argv[1]), "v4 train"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(s3: S3Server, request: pytest.FixtureRequest) -> StoragePath:
    s3.set_faults()
    name = request.node.name.replace("_", "-").replace("[", "-").strip("]")[:60].strip("-")
    return StoragePath(f"{s3.make_bucket(name.lower())}/run")


def of_another_host(folder: StoragePath) -> Owner:
    """A lease that a process on another host has taken."""
    owner = Owner.current("v4 train", folder, "").model_copy(
        update={"host": "far", "machine": "far 1", "pid": 4711, "token": "abc"}
    )
    (folder / LEASE_FILE).write(owner.model_dump_json())
    return owner


def test_a_living_owner_is_named_and_a_killed_one_replaced(folder: StoragePath) -> None:
    command = [sys.executable, "-c", HELD, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(LeaseError) as refused, Lease(folder, "v4 train"):
        pass
    process.kill()
    process.wait()
    assert f"{folder}: `v4 train` (process {process.pid} on " in str(refused.value)
    assert "has been working here since 20" in str(refused.value)
    with Lease(folder, "v4 train"):
        assert LEASE_FILE in folder.names()
    assert folder.names() == []


def test_another_host_is_alive_while_it_gives_signs(folder: StoragePath) -> None:
    of_another_host(folder)
    file = lease_file.ObjectLeaseFile(folder / LEASE_FILE)
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(0.5):
            file.renew()

    thread = threading.Thread(target=renew)
    thread.start()
    lines: list[str] = []
    try:
        with pytest.raises(LeaseError, match="process 4711 on far"):
            Lease(folder, "v4 train", log=lines.append, renew=1.0, stale=4.0).__enter__()
    finally:
        stop.set()
        thread.join()
    assert len(lines) == 1 and "waiting for up to 4 s" in lines[0]


def test_an_owner_that_was_away_learns_that_it_lost_the_lease(folder: StoragePath) -> None:
    late = Lease(folder, "v4 train", **QUICK)
    late._renew = lambda: None  # type: ignore[method-assign]
    late._thread = threading.Thread(target=late._renew)
    with late:
        far = late.owner.model_copy(update={"machine": "far 1", "host": "far"})
        (folder / LEASE_FILE).write(far.model_dump_json())
        with Lease(folder, "v4 train", log=lambda _: None, **QUICK) as new:
            thread = threading.Thread(target=lambda: Lease._renew(late), daemon=True)
            thread.start()
            deadline = time.monotonic() + 10
            while late._loss is None and time.monotonic() < deadline:
                time.sleep(0.05)
            with pytest.raises(LeaseError, match="has taken the folder over"):
                late.check()
            new.check()
            assert Owner.parse((folder / LEASE_FILE).read_text()) == new.owner


def test_a_storage_that_ignores_conditions_gives_it_to_the_last_writer(
    folder: StoragePath, s3: S3Server
) -> None:
    s3.set_faults({"method": "PUT", "path": LEASE_FILE, "ignore_conditions": True, "times": 10**6})
    results: list[bool] = []

    def take(name: str) -> None:
        file = lease_file.ObjectLeaseFile(folder / LEASE_FILE, settle=1.0)
        results.append(file.create(name))

    threads = [threading.Thread(target=take, args=(f"owner {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False, False, False, True]


def test_a_lost_answer_is_no_other_owner(folder: StoragePath) -> None:
    """The write has succeeded, and its repetition finds the object."""
    file = lease_file.ObjectLeaseFile(folder / LEASE_FILE)
    (folder / LEASE_FILE).write("ours")
    assert file.create("ours")
    assert not file.create("theirs")
