"""A run that hangs is explained, ended and restarted; by torchrun and by a single process."""

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.processes import RESTART_ENVIRONMENT
from tests.trainer.tiny import column, train

RANKS = 3
PATIENCE = 4.0  # seconds
HOST = socket.gethostname()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"OMP_NUM_THREADS": "1", **RESTART_ENVIRONMENT}.items():
        monkeypatch.setenv(name, value)


def hang(
    how: str, tiny: Path, run_dir: Path, ranks: int = RANKS, rank: int = 1, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """Trains with one rank that hangs in its fifth step."""
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["trainer.process.torchrun", "--standalone", f"--nproc-per-node={ranks}"]
        command += [f"--max-restarts={restarts}", "-m"]
    command += ["benchmarks.steps.planted", how, str(rank), str(tiny), f"run_dir={run_dir}"]
    command += ["checkpoint.every=2", f"watchdog={{seconds: {PATIENCE}, slow_seconds: 60}}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def paragraph(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.startswith("v4: no progress")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.slow
def test_a_skipped_collective_is_explained_and_the_run_restarts(tiny: Path, tmp_path: Path) -> None:
    done = hang("skip", tiny, tmp_path / "run", restarts=1)
    assert done.returncode == 0, done.stderr
    text = paragraph(done)
    assert re.search(
        rf"ranks 0, 2 on {HOST} wait in all_reduce number \d+ over the axis world", text
    )
    assert "(step 5, forward and backward, trainer/engine.py, line" in text
    assert re.search(rf"\) for rank 1; rank 1 on {HOST} waits in \w+ number \d+ over", text)
    assert "resumed from" in done.stdout
    folder = Path(re.search(r"records are in (\S+);", text)[1])  # type: ignore[index]
    for rank in range(RANKS):
        stacks = (folder / f"rank-{rank:05d}.txt").read_text()
        assert f"rank {rank} on {HOST}" in stacks and "in forward_backward" in stacks
        assert "all_reduce" in (folder / f"rank-{rank:05d}.fr.json").read_text()
    train(tiny, tmp_path / "undisturbed")
    assert column(tmp_path / "run", "loss") == pytest.approx(
        column(tmp_path / "undisturbed", "loss"), abs=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop", "hold"])
def test_a_rank_that_cannot_answer_is_named(how: str, tiny: Path, tmp_path: Path) -> None:
    done = hang(how, tiny, tmp_path / "run")
    assert done.returncode != 0
    text = paragraph(done)
    assert re.search(rf" for rank 1; rank 1 on {HOST} \(pid \d+\) does not answer", text)
    assert ("planted.py" in done.stderr) == (how == "hold"), "its stacks"


@pytest.mark.slow
def test_a_stopped_first_rank_is_named(tiny: Path, tmp_path: Path) -> None:
    """It has the store that the ranks would report to each other through."""
    start = time.monotonic()
    done = hang("stop", tiny, tmp_path / "run", rank=0)
    assert done.returncode == 1 and time.monotonic() - start < 200
    text = paragraph(done)
    assert ": rank 0, whose process on " in text and "has not answered for 3" in text
    assert re.search(rf"; rank 1 on {HOST} waits in all_reduce number \d+ over the axis ", text)
    (folder,) = (tmp_path / "run/hangs").iterdir()
    assert sorted(path.name[:10] for path in folder.glob("*.txt")) == ["rank-00001", "rank-00002"]


@pytest.mark.slow
def test_a_single_process_is_watched_as_well(tiny: Path, tmp_path: Path) -> None:
    done = hang("sleep", tiny, tmp_path / "run", ranks=1, rank=0)
    assert done.returncode == 1
    assert f"rank 0 on {HOST} is in no collective but in step 5, forward and backward" in paragraph(
        done
    )
