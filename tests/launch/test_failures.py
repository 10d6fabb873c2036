"""A rank that fails takes the others down, reports its rank and the reason once, and in time."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.lease import LEASE_FILE
from launch.processes import RESTART_ENVIRONMENT
from trainer.process import failures

RANKS = 3
LIMIT = 60.0  # seconds


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"OMP_NUM_THREADS": "1", **RESTART_ENVIRONMENT}.items():
        monkeypatch.setenv(name, value)


def torchrun(*arguments: object, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(RANKS), "--max-restarts", str(restarts)]
    command += ["-m", "tests.launch.failing", *map(str, arguments)]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * LIMIT)
    assert time.monotonic() - started < LIMIT
    assert "forcefully" not in done.stderr  # nothing waits for torchrun's SIGKILL
    return done


@pytest.mark.parametrize(
    ("rank", "how"),
    [
        (1, "crash"),
        pytest.param(0, "crash", marks=pytest.mark.slow),
        pytest.param(1, "early", marks=pytest.mark.slow),
    ],
)
def test_a_crash_names_its_rank_and_ends_all(
    tiny: Path, tmp_path: Path, rank: int, how: str
) -> None:
    done = torchrun(rank, how, tiny, f"run_dir={tmp_path}")
    assert done.returncode == 1
    sentence = f"v4: rank {rank} on {socket.gethostname()} failed: RuntimeError: out of luck"
    assert done.stderr.splitlines().count(sentence) == 1
    assert not (tmp_path / LEASE_FILE).exists()
    ours, page = done.stderr.split("ChildFailedError", 1)
    assert ours.count("Traceback (most recent call last)") == 2  # ours, and torchrun's of itself
    page = page.split("Root Cause", 1)[1]
    assert f"rank      : {rank} " in page and "out of luck" in page


@pytest.mark.slow
def test_a_mistake_seen_by_one_rank_is_one_sentence(tiny: Path, tmp_path: Path) -> None:
    done = torchrun(1, "mistake", tiny, f"run_dir={tmp_path}")
    assert done.stderr.count("v4: error: the shard is damaged.\n") == 1
    assert "exitcode  : 2" in done.stderr and "failing.py" not in done.stderr
    assert done.returncode == 1  # torchrun's own


@pytest.mark.slow
@pytest.mark.parametrize(("how", "restarts", "code"), [("away", 1, 0), ("away", 0, 1)])
def test_a_file_server_that_is_away_is_tried_again(
    tiny: Path, tmp_path: Path, how: str, restarts: int, code: int
) -> None:
    """By `v4 train`, which ends at once after a mistake of the user."""
    script = f"""
import sys
from launch import processes
torchrun = [sys.executable, "-m", "trainer.process.torchrun", "--standalone"]
torchrun += ["--nproc-per-node=2", "--max-restarts={restarts}", "-m", "tests.launch.failing"]
processes.training_command = lambda arguments, *others: [*torchrun, "1", {how!r}, *arguments]
sys.exit(processes.train(sys.argv[1:], 2, {restarts}))
"""
    command = [sys.executable, "-c", script, str(tiny), f"run_dir={tmp_path}"]
    command += ["steps=3", "checkpoint.every=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * LIMIT)
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines().count("v4: failed: a.bin: Stale file handle") == 1
    assert "resumed from" in done.stdout or not restarts


@pytest.mark.slow
def test_a_crash_before_the_checks_hangs_no_rank(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the run folder should be")
    done = torchrun(1, "crash", tiny, f"run_dir={tmp_path / 'run'}")
    assert done.stderr.count("v4: error: ") == 1
    assert f"cannot write {tmp_path / 'run'}/lease.json: File exists" in done.stderr


@pytest.mark.parametrize(
    ("rank", "host", "is_repeated"),
    [(0, "elsewhere", True), (0, socket.gethostname(), False), (1, "elsewhere", False)],
)
def test_only_the_first_rank_repeats_what_failed_on_another_host(
    rank: int,
    host: str,
    is_repeated: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(failures, "POLL_SECONDS", 0.0)
    watch = failures.FailureWatch()
    watch.store = SimpleNamespace(
        check=lambda keys: True, get=lambda key: f"2 {host} v4: error: a sentence.".encode()
    )
    monkeypatch.setattr(watch, "_end", sys.exit)
    with pytest.raises(SystemExit, match="2"):
        watch._poll()
    assert capsys.readouterr().err == "v4: error: a sentence.\n" * is_repeated


def test_the_other_ranks_learn_of_a_failure_that_cannot_be_printed() -> None:
    code = """
import sys
from types import SimpleNamespace
from trainer.process.failures import FailureWatch
watch = FailureWatch()
watch.store = SimpleNamespace(add=lambda key, n: 1, set=lambda key, text: print(text, flush=True))
watch.report(RuntimeError("out of luck"))
"""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writer, env=environment
    )
    os.close(writer)
    assert done.returncode == 1 and b"failed: RuntimeError: out of luck" in done.stdout
