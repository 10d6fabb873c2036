"""wandb with servers that refuse, stall, and return errors: training neither waits nor ends."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import psutil
import pytest
import wandb

from tests.wandb_server import WandbServer, wandb_server
from trainer.config import RunConfig, load_config
from trainer.metrics import wandb_log
from trainer.metrics.wandb_log import WandbLog, run_id

KEY = "0123456789abcdef" * 2 + "01234567"
SECONDS = 3.0


@pytest.fixture(autouse=True)
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A key in the environment, an empty home, short waits, and no wandb left afterwards."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setattr(wandb_log, "START_SECONDS", SECONDS)
    monkeypatch.setattr(wandb_log, "FINISH_SECONDS", SECONDS)
    wandb.teardown()
    yield
    wandb.teardown()


@contextmanager
def no_server() -> Iterator[str]:
    """The URL of a port that refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def config_in(tiny: Path, run_dir: Path, mode: str = "auto") -> RunConfig:
    return load_config(tiny, [f"run_dir={run_dir}", f"metrics.wandb.mode={mode}"])


def train_five_steps(config: RunConfig, lines: list[str]) -> float:
    """Logs five records; returns the longest time that the caller waited for one."""
    log = WandbLog(config, lines.append)
    longest = 0.0
    for step in range(1, 6):
        start = time.monotonic()
        log.log({"step": step, "loss": 1.0 / step, "layers": {"sink_max": [0.5, None]}})
        longest = max(longest, time.monotonic() - start)
    log.close(0)
    return longest


def offline_folder(run_dir: Path) -> Path:
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    return folder


def assert_no_key(folder: Path, lines: list[str]) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert not [line for line in lines if KEY in line]


@pytest.mark.parametrize("fault", ["refused", "401", "500", "stall"])
def test_a_server_that_fails_costs_a_warning(
    tiny: Path,
    tmp_path: Path,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    lines: list[str] = []
    start = time.monotonic()
    server = no_server() if fault == "refused" else wandb_server(fault)  # type: ignore[arg-type]
    with server as made:
        monkeypatch.setenv("WANDB_BASE_URL", made.url if isinstance(made, WandbServer) else made)
        longest = train_five_steps(config_in(tiny, tmp_path / "run"), lines)
        assert time.monotonic() - start < 3 * SECONDS + 10
    assert longest < 0.1
    folder = offline_folder(tmp_path / "run")
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    reason = {"refused": "refused", "401": "401", "500": "500", "stall": "deadline"}[fault]
    assert re.search(f"wandb: .*{reason}.*wandb sync {re.escape(str(folder))}$", warning)
    output = capfd.readouterr()
    assert_no_key(tmp_path / "run", [*lines, output.out, output.err])
    assert "Traceback" not in output.out + output.err

    with wandb_server("ok") as server_up:
        command = [sys.executable, "-m", "wandb", "sync", str(folder)]
        environment = {**os.environ, "WANDB_BASE_URL": server_up.url}
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        history = server_up.history()
    assert [record["step"] for record in history] == [1, 2, 3, 4, 5]
    assert history[1]["loss"] == 0.5 and history[1]["layers/sink_max/00"] == 0.5


@pytest.mark.parametrize("mode", ["ok", "slow"])
def test_a_server_that_answers_gets_every_record(
    tiny: Path, tmp_path: Path, mode: Literal["ok", "slow"], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(wandb_log, "FINISH_SECONDS", 30.0)
    with wandb_server(mode) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert train_five_steps(config_in(tiny, tmp_path / "run", "online"), lines) < 0.1
        assert [record["step"] for record in server.history()] == [1, 2, 3, 4, 5]
    assert not [line for line in lines if "warning" in line]


def test_a_server_that_stalls_later_costs_a_warning(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    with wandb_server("ok") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        log = WandbLog(config_in(tiny, tmp_path / "run"), lines.append)
        while not any(b"upsertBucket" in body for _, body in server.requests):
            time.sleep(0.05)
        time.sleep(0.5)
        server.mode = "stall"
        log.log({"step": 1})
        start = time.monotonic()
        log.close(0)
        assert time.monotonic() - start < 2 * SECONDS + 10
    (folder,) = (tmp_path / "run/wandb").glob("run-*-*")
    assert lines[-1].startswith("warning: wandb: ") and lines[-1].endswith(f"wandb sync {folder}")


def test_a_key_that_is_none_costs_a_warning(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setenv("WANDB_API_KEY", "not a key")
    with no_server() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        train_five_steps(config_in(tiny, tmp_path / "run"), lines)
    offline_folder(tmp_path / "run")
    assert len([line for line in lines if line.startswith("warning: wandb: ")]) == 1
    assert not [line for line in lines if "not a key" in line]


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_without_a_key_the_run_is_offline(
    tiny: Path, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is asked for one, on a terminal neither."""
    monkeypatch.delenv("WANDB_API_KEY")
    lines: list[str] = []
    train_five_steps(config_in(tiny, tmp_path / "run", mode), lines)
    offline_folder(tmp_path / "run")
    assert ["no API key is found" in line for line in lines] == [True] * (mode == "online")


def test_a_moved_run_keeps_its_id_and_a_copy_gets_another(tmp_path: Path) -> None:
    original = run_id(tmp_path / "a")
    assert run_id(tmp_path / "a") == original
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    copy = run_id(tmp_path / "copy")
    assert copy != original
    (tmp_path / "a").rename(tmp_path / "b")
    assert run_id(tmp_path / "b") == original
    assert run_id(tmp_path / "copy") == copy
    (tmp_path / "c" / "wandb").mkdir(parents=True)
    (tmp_path / "c" / "wandb" / "run-id").write_text("0123abcd\n")  # as earlier versions wrote it
    assert run_id(tmp_path / "c") == "0123abcd"
    shutil.copytree(tmp_path / "c", tmp_path / "d")  # after a resume, the id has its folder
    assert run_id(tmp_path / "d") != "0123abcd"


def kill_service() -> None:
    """wandb's own processes, as the kernel ends them when memory runs out."""
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("wandb"):
            process.kill()


KILLED = """
import sys, time
from pathlib import Path
from tests.trainer.metrics.test_wandb_log import kill_service
from trainer.config import load_config
from trainer.metrics.wandb_log import WandbLog

config = load_config(sys.argv[1], ["run_dir=" + sys.argv[2], "metrics.wandb.mode=offline"])
log = WandbLog(config, print)
log.log({"step": 1, "loss": 1.0})
while not list(Path(sys.argv[2]).glob("wandb/offline-run-*/*.wandb")):
    time.sleep(0.1)
time.sleep(2.0)
kill_service()
time.sleep(1.0)
for step in (2, 3, 4):
    log.log({"step": step, "loss": 1.0})
    time.sleep(0.1)
log.close(0)
print("end")
"""


@pytest.mark.slow
def test_a_service_that_is_killed_costs_a_warning(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tiny), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    warning, end = done.stdout.splitlines()
    assert warning.startswith("warning: wandb: ") and end == "end"
    assert warning.endswith(f"wandb sync {offline_folder(tmp_path / 'run')}")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_service_that_is_killed_at_the_start(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is offline then, with a new service; without one, the sync of earlier parts."""
    lines: list[str] = []
    plain = WandbLog._init

    def init(self: WandbLog, mode: Literal["online", "offline"]) -> object:
        wandb.setup().ensure_service()
        if mode == "online" or is_hopeless:
            kill_service()
            time.sleep(0.5)
        return plain(self, mode)

    monkeypatch.setattr(WandbLog, "_init", init)
    with wandb_server("ok") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        is_hopeless = False
        train_five_steps(config_in(tiny, tmp_path / "run"), lines)
        folder = offline_folder(tmp_path / "run")
        is_hopeless = True
        train_five_steps(config_in(tiny, tmp_path / "run"), lines)
        wandb_log._close_session()
    first, second = [line for line in lines if line.startswith("warning: ")]
    assert first.endswith(
        f"this run is logged offline, to upload it later, run: wandb sync {folder}"
    )
    assert "; it does not log from here on; to upload what it has, run: wandb sync " in second
