"""One run at a time trains, imports or exports into a folder; the lease ends with the command."""

import subprocess
import sys
from pathlib import Path

import pytest

from data.lease import LEASE_FILE, Lease
from tests.trainer.tiny import steps_in_file, train
from trainer.__main__ import main as train_command
from trainer.commands import main as command

LOST = """
import sys
from data.lease import Lease, LeaseError

def check(self):
    raise LeaseError("lost")

Lease.check = check
from trainer.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_second_training_is_refused_and_touches_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny, tmp_path / "run", "steps=2")
    with Lease(tmp_path / "run", "v4 train"):
        before = files_in(tmp_path / "run")
        config = (tmp_path / "run/config.yaml").read_text()
        assert train_command([str(tmp_path / "run"), "steps=3"]) == 2
        assert files_in(tmp_path / "run") == before
        assert (tmp_path / "run/config.yaml").read_text() == config
    errors = capsys.readouterr().err.splitlines()
    (error,) = [line for line in errors if line.startswith("v4: error: ")]
    assert "run: `v4 train` (process " in error and " s ago" in error
    assert train_command([str(tmp_path / "run"), "steps=3"]) == 0
    assert steps_in_file(tmp_path / "run") == [1, 2, 3]
    assert not (tmp_path / "run" / LEASE_FILE).exists()


def test_import_and_export_too(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny, tmp_path / "run", "steps=2")
    out = tmp_path / "hf"
    with Lease(tmp_path, "v4 export", name=f".hf.{LEASE_FILE}"):
        assert command(["export", str(tmp_path / "run"), str(out)]) == 2
    assert command(["export", str(tmp_path / "run"), str(out)]) == 0
    assert not list(tmp_path.glob(f".*{LEASE_FILE}"))
    into = ["import", str(tiny), str(out), f"run_dir={tmp_path / 'again'}"]
    with Lease(tmp_path / "again", "v4 train"):
        assert command(into) == 2
    assert capsys.readouterr().err.count("wait for its end, or stop it") == 2
    assert command(into) == 0 and not (tmp_path / "again" / LEASE_FILE).exists()


def test_a_lost_lease_ends_the_run_before_it_writes(tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path, "steps=2")
    text = (tmp_path / "metrics.jsonl").read_text()
    done = subprocess.run(
        [sys.executable, "-c", LOST, str(tmp_path), "steps=4"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.endswith("v4: error: lost\n")
    assert (tmp_path / "metrics.jsonl").read_text() == text
    assert not (tmp_path / LEASE_FILE).exists()


def test_a_complete_run_says_so(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny, tmp_path, "steps=2")
    before = files_in(tmp_path), (tmp_path / "config.yaml").stat().st_mtime_ns
    capsys.readouterr()
    assert train_command([str(tmp_path)]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path}: complete, with 2 of 2 steps; to train on, set more steps\n"
    )
    assert (files_in(tmp_path), (tmp_path / "config.yaml").stat().st_mtime_ns) == before
    assert train_command([str(tmp_path), "steps=1"]) == 2  # there is a later checkpoint
    assert "is at step 2, beyond steps = 1" in capsys.readouterr().err
