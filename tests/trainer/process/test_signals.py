"""SIGTERM before the first step: it ends within seconds, with 0 or 143, and nothing is begun."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.lease import LEASE_FILE, Lease, Owner
from tests.distributed import free_port
from trainer import trainer
from trainer.__main__ import main
from trainer.process.exit_codes import exit_code_of
from trainer.process.signals import StopRequest, stop_on_signals

LIMIT = 60.0


def wait_for_port(port: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            socket.create_connection(("localhost", port), timeout=1.0).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)


def terminate(process: subprocess.Popen[str]) -> tuple[float, str, str]:
    """Seconds to the end, stdout and stderr."""
    start = time.monotonic()
    process.terminate()
    out, error = process.communicate(timeout=LIMIT)
    return time.monotonic() - start, out, error


def popen(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    pipe, environment = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def test_a_signal_ends_the_wait_for_other_ranks(tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    with popen("trainer", tiny, f"run_dir={tmp_path}", **rank, MASTER_PORT=str(port)) as process:
        wait_for_port(port, process)
        seconds, out, error = terminate(process)
    assert process.returncode == 128 + signal.SIGTERM and seconds < 30
    assert out.endswith("stopped while connecting to the other processes; nothing was begun\n")
    assert "Traceback" not in error and not list(tmp_path.iterdir())


def test_a_signal_ends_the_wait_of_torchrun_for_other_hosts(tmp_path: Path) -> None:
    port = free_port()
    options = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
    torchrun = ("trainer.process.torchrun", *options, "--rdzv-conf=is_host=true", "-m", "trainer")
    with popen(*torchrun) as process:
        wait_for_port(port, process)
        seconds, _, error = terminate(process)
    assert exit_code_of(process.returncode) == 128 + signal.SIGTERM and seconds < 30
    assert "Traceback" not in error


def test_a_signal_ends_the_wait_for_a_lease(tiny: Path, tmp_path: Path) -> None:
    """Of a host that was working in the folder."""
    owner = Owner.current("v4 train", tmp_path, "").model_copy(update={"machine": "far"})
    (tmp_path / LEASE_FILE).write_text(owner.model_dump_json())
    with popen("trainer", tiny, f"run_dir={tmp_path}") as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        assert "waiting for up to 120 s" in lines[1]
        seconds, out, error = terminate(process)
    assert (process.returncode, out) == (0, "stopped before the first step\n")
    assert "error" not in error and "Traceback" not in error
    assert seconds < 30 and [path.name for path in tmp_path.iterdir()] == [LEASE_FILE]


@pytest.mark.parametrize(("before", "is_asked"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_closed_terminal_asks_for_a_stop_but_not_under_nohup(
    before: signal.Handlers, is_asked: bool
) -> None:
    """torchrun sends its ranks the SIGHUP that it got."""
    old = signal.signal(signal.SIGHUP, before)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested == is_asked
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_stop_before_the_model_is_built(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*arguments: object) -> None:
        raise AssertionError("the model is built")

    monkeypatch.setattr(StopRequest, "requested", True, raising=False)
    monkeypatch.setattr(StopRequest, "__init__", lambda self: None)
    monkeypatch.setattr(trainer, "Trainer", build)
    assert main([str(tiny), f"run_dir={tmp_path}"]) == 0
    assert capsys.readouterr().out.endswith("stopped before the first step\n")
    assert not list(tmp_path.iterdir())
    with Lease(tmp_path, "v4 train"):
        pass  # it was released
