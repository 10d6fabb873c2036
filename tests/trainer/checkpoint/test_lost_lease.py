"""A process that was stopped for longer than its lease lasts: another one has the run by then."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from data import held_lease
from data.held_lease import HeldLease
from data.lease import LEASE_FILE, LeaseError, Owner
from data.storage import AnyPath, StoragePath, retries
from tests.s3 import S3Server
from trainer.checkpoint import manifest
from trainer.checkpoint.background import BackgroundSaves
from trainer.checkpoint.folder import CheckpointFolder, as_boxes, checkpoints_in, step_of
from trainer.parallel.grid import Grid
from trainer.process.errors import SaveError


@pytest.fixture(params=["file system", "object storage"])
def folder(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AnyPath:
    monkeypatch.setattr(retries, "DELAYS", (0.02,) * 4)
    if request.param == "file system":
        return tmp_path
    s3: S3Server = request.getfixturevalue("s3")
    s3.set_faults()
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)[:50].strip("-")
    return StoragePath(f"{s3.make_bucket(name.lower())}/run")


def take(folder: AnyPath, token: str) -> HeldLease:
    """Makes the process with this token the owner."""
    owner = Owner.current("v4 train", folder, "").model_copy(update={"token": token})
    path = folder / LEASE_FILE
    if isinstance(path, StoragePath):
        path.write(owner.model_dump_json())
    else:
        path.write_text(owner.model_dump_json())
    return HeldLease(str(path), token)


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((100,), value)}


def assert_intact(folder: AnyPath, steps: list[int], value: float) -> None:
    """These checkpoints are there, with this value and no file of another attempt."""
    paths = checkpoints_in(folder)
    assert [step_of(path) for path in paths] == steps
    for path in paths:
        loaded = tensors(0.0)
        CheckpointFolder(folder, Grid.single()).load(path, loaded)
        assert float(loaded["w"][-1]) == value
        names = {one.name for one in path.iterdir()}
        assert names == {*manifest.read(path)[0], manifest.NAME}


def test_a_writer_that_was_stopped_publishes_and_removes_nothing(folder: AnyPath) -> None:
    boxes = as_boxes(tensors(1.0))
    checkpoints = CheckpointFolder(folder, Grid.single(), leases=[take(folder, "aa")])
    saves = BackgroundSaves(checkpoints, boxes)
    assert saves._writer is not None
    writer = psutil.Process(saves._writer.pid)
    writer.suspend()
    saves.begin(20, boxes, {"step": 20})
    newer = CheckpointFolder(folder, Grid.single(), leases=[take(folder, "bb")])
    for step in (20, 30, 40):
        newer.save(step, tensors(2.0), {"step": step})
    writer.resume()
    with pytest.raises(LeaseError, match=r"`v4 train` .* has taken the folder over, since this"):
        saves.finish()
        saves.begin(30, boxes, {"step": 30})  # on a file system, its folder was gone
    saves.close()
    assert_intact(folder, [20, 30, 40], 2.0)


def test_a_writer_keeps_what_is_published_after_its_own_files(folder: AnyPath) -> None:
    """The other process begins once this one's files are complete."""
    boxes = as_boxes(tensors(1.0))
    checkpoints = CheckpointFolder(folder, Grid.single(), leases=[take(folder, "aa")])
    new = checkpoints.begin(20)
    take(folder, "bb")
    with pytest.raises(LeaseError):
        checkpoints._publish(new, {}, {"step": 20})
    assert checkpoints_in(folder) == [] and not list(folder.glob("*step-*"))
    newer = CheckpointFolder(folder, Grid.single())
    for step in (20, 30):
        newer.save(step, tensors(2.0), {"step": step})
    checkpoints.keep, checkpoints._may_prune = 1, True
    for action in (
        lambda: checkpoints.save(10, boxes, {"step": 10}),
        lambda: checkpoints.save(20, boxes, {"step": 20}, reuse=True),
        lambda: checkpoints.remove(folder / "step-00000030"),
        checkpoints.prune,
    ):
        with pytest.raises(LeaseError):
            action()
    assert_intact(folder, [20, 30], 2.0)


def test_a_lease_that_was_removed_fails_the_save(
    folder: AnyPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner writes it again, unless another process has had it."""
    monkeypatch.setattr(held_lease, "MISSING_SECONDS", 0.1)
    checkpoints = CheckpointFolder(folder, Grid.single(), leases=[take(folder, "aa")])
    checkpoints.save(1, tensors(1.0), {"step": 1})
    (folder / LEASE_FILE).unlink()
    with pytest.raises(SaveError, match=r"could not be written: lease\.json has been removed"):
        checkpoints.save(2, tensors(1.0), {"step": 2})
    assert_intact(folder, [1], 1.0)


TAKEN = """
import sys
from pathlib import Path
from trainer.checkpoint import PeriodicCheckpoints
from trainer.__main__ import main

plain = PeriodicCheckpoints.before_evaluation

def before_evaluation(self, state, result):
    path = Path(sys.argv[1], "lease.json")
    text = path.read_text()
    path.write_text(text.replace('"token": "', '"token": "0'))
    plain(self, state, result)

PeriodicCheckpoints.before_evaluation = before_evaluation
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_run_ends_in_one_sentence(tiny: Path, tmp_path: Path, mode: str) -> None:
    (tmp_path / "config.yaml").write_text(tiny.read_text())
    arguments = [str(tmp_path), f"run_dir={tmp_path}", "steps=4"]
    done = subprocess.run(
        [sys.executable, "-c", TAKEN, *arguments, f"checkpoint={{every: 2, mode: {mode}}}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("v4: error")]
    assert "has taken the folder over" in error and "Traceback" not in done.stderr
    assert checkpoints_in(tmp_path / "checkpoints") == []
