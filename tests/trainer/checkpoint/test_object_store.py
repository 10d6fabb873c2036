"""Checkpoints in object storage: published by their manifest, whatever the server does."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from data.storage import Parts, StoragePath, retries
from data.storage import path as storage_path
from tests.distributed import spawn
from tests.s3 import S3Server
from trainer.checkpoint import manifest
from trainer.checkpoint.concurrent import read_newest
from trainer.checkpoint.folder import CheckpointFolder, checkpoints_in, read_state
from trainer.checkpoint.logical_tensors import TensorBox
from trainer.config.published import STEPS_FILE
from trainer.parallel.grid import Degrees, Grid
from trainer.process.errors import CheckpointError, SaveError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between attempts are short."""
    monkeypatch.setattr(retries, "DELAYS", (0.02,) * 4)


@pytest.fixture
def folder(s3: S3Server, request: pytest.FixtureRequest) -> StoragePath:
    """A place in a new bucket."""
    s3.set_faults()
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)[:60].strip("-")
    return StoragePath(f"{s3.make_bucket(name.lower())}/runs/one")


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 5), value), "b": torch.arange(7), "c": torch.zeros(2, 0)}


def saved_steps(folder: StoragePath) -> list[str]:
    return [path.name for path in checkpoints_in(folder)]


def test_save_load_prune_and_remove(folder: StoragePath) -> None:
    checkpoints = CheckpointFolder(folder, Grid.single(CPU), keep=2)
    assert checkpoints.newest() is None
    for step in (1, 2, 3):
        checkpoints.save(step, tensors(float(step)), {"step": step})
        assert checkpoints.prune() is None
    assert saved_steps(folder) == ["step-00000002", "step-00000003"]
    newest = checkpoints.newest()
    assert newest is not None and newest.name == "step-00000003"
    loaded = {name: torch.zeros_like(one) for name, one in tensors().items()}
    checkpoints.load(newest, loaded)
    assert all(torch.equal(loaded[name], one) for name, one in tensors(3.0).items())
    assert checkpoints.remove(newest) is None
    assert saved_steps(folder) == ["step-00000002"] == folder.names()[:1]
    checkpoints.save(1, tensors(), {"step": 1})  # undoes step 2
    assert saved_steps(folder) == ["step-00000001"]
    assert json.loads((folder / STEPS_FILE).read_text()) == {"steps": [1]}


def test_a_part_of_a_tensor_is_read_by_ranges(folder: StoragePath, s3: S3Server) -> None:
    whole = torch.arange(4096 * 512, dtype=torch.float32).view(4096, 512)
    checkpoints = CheckpointFolder(folder, Grid.single(CPU))
    path = checkpoints.save(1, {"w": whole}, {"step": 1})
    before = len(s3.requests())
    part = TensorBox(torch.zeros(8, 100), (4096, 512), (64, 12))
    checkpoints.load(path, {"w": [part]})
    assert torch.equal(part.tensor, whole[64:72, 12:112])
    gets = [one for one in s3.requests()[before:] if "safetensors" in one]
    assert len(gets) == 2, "the header, and the rows"


@pytest.mark.parametrize(
    "fault",
    [
        {"method": "PUT", "path": "safetensors", "status": 503, "times": 3},
        pytest.param(
            {"method": "PUT", "path": "safetensors", "cut": 200, "times": 1},
            marks=pytest.mark.slow,  # the driver waits for an answer for 15 s
        ),
        {"method": "PUT", "path": "manifest", "status": 500, "times": 3},
        {"method": "GET", "path": "list-type", "status": 503, "times": 3},
        {"path": "safetensors", "slow": 0.3, "times": 1},
    ],
)
def test_a_fault_that_passes(folder: StoragePath, s3: S3Server, fault: dict) -> None:
    s3.set_faults(fault)
    checkpoints = CheckpointFolder(folder, Grid.single(CPU))
    path = checkpoints.save(1, tensors(), {"step": 1})
    assert s3.applied() == [fault["times"]]
    s3.set_faults({"method": "GET", "path": "safetensors", "status": 503, "times": 3})
    assert checkpoints.newest() == path
    loaded = {name: torch.zeros_like(one) for name, one in tensors().items()}
    checkpoints.load(path, loaded)
    assert all(torch.equal(loaded[name], one) for name, one in tensors().items())


def test_an_upload_that_stands_still_is_repeated(
    folder: StoragePath, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drivers have no limit for it: they would wait for hours, and the next save with them."""
    monkeypatch.setattr(storage_path, "WRITE_SECONDS", 1.0)
    s3.set_faults({"method": "PUT", "path": "object", "slow": 10.0, "times": 1})
    start = time.monotonic()
    (folder / "object").write(b"content")
    assert time.monotonic() - start < 9.0
    assert (folder / "object").read_bytes() == b"content"


def test_a_fault_that_stays_loses_nothing(folder: StoragePath, s3: S3Server) -> None:
    checkpoints = CheckpointFolder(folder, Grid.single(CPU))
    checkpoints.save(1, tensors(), {"step": 1})
    s3.set_faults({"method": "PUT", "path": "manifest", "status": 503, "times": 10**6})
    with pytest.raises(SaveError, match=r"step-00000002: the checkpoint could not be written"):
        checkpoints.save(2, tensors(), {"step": 2})
    assert saved_steps(folder) == ["step-00000001"]
    assert "step-00000002" in folder.names(), "its files are there, and do not count"
    s3.set_faults()
    checkpoints.save(3, tensors(), {"step": 3})
    assert saved_steps(folder) == ["step-00000001", "step-00000003"]
    assert "step-00000002" not in folder.names()


def test_a_step_that_is_saved_again_is_replaced_by_the_manifest(
    folder: StoragePath, s3: S3Server, tmp_path: Path
) -> None:
    checkpoints = CheckpointFolder(folder, Grid.single(CPU))
    path = checkpoints.save(1, tensors(1.0), {"step": 1, "of": "old"})
    s3.set_faults({"method": "PUT", "path": "manifest.json", "status": 503, "times": 10**6})
    with pytest.raises(SaveError):
        checkpoints.save(1, tensors(2.0), {"step": 1, "of": "new"})
    s3.set_faults()
    for value, name in ((1.0, "old"), (2.0, "new")):
        assert checkpoints.newest() == path and read_state(path)["of"] == name
        loaded = tensors(0.0)
        checkpoints.load(path, loaded)
        assert float(loaded["a"][0, 0]) == value
        checkpoints.save(1, tensors(2.0), {"step": 1, "of": "new"})
    assert {*path.names()} == {*manifest.read(path)[0], manifest.NAME}, "the old files are gone"
    copy = tmp_path / path.name
    copy.mkdir()
    for one in path.iterdir():
        one.download(copy / one.name)
    loaded = tensors(0.0)
    local = CheckpointFolder(tmp_path, Grid.single(CPU))
    assert local.newest() == copy and read_state(copy)["of"] == "new"
    local.load(copy, loaded)
    assert float(loaded["a"][0, 0]) == 2.0


def test_what_was_published_is_not_abandoned(folder: StoragePath) -> None:
    """As after the end of a writer between the manifest and its answer."""
    checkpoints = CheckpointFolder(folder, Grid.single(CPU))
    path = checkpoints.save(1, tensors(), {"step": 1})
    token = next(name for name in path.names() if name != manifest.NAME).partition("-")[0]
    assert checkpoints.store.has_published(1, token)
    assert not checkpoints.store.has_published(1, "another")
    checkpoints.abandon(1, token, OSError())
    assert checkpoints.newest() == path


def test_a_reader_begins_again_where_a_step_is_saved_again(folder: StoragePath) -> None:
    checkpoints = CheckpointFolder(folder, Grid.single(CPU))
    path = checkpoints.save(1, tensors(1.0), {"step": 1})
    files = sorted(manifest.read(path)[0])[:1]

    def read() -> float:
        if files:  # which the first call has read of the manifest
            checkpoints.save(1, tensors(2.0), {"step": 1})
            (path / files.pop()).read_bytes()
        loaded = tensors(0.0)
        checkpoints.load(path, loaded)
        return float(loaded["a"][0, 0])

    assert read_newest(checkpoints, read) == 2.0


def test_a_checkpoint_of_an_earlier_version(folder: StoragePath, tmp_path: Path) -> None:
    """Its files have the same names in every attempt."""
    plain = CheckpointFolder(tmp_path, Grid.single(CPU)).save(1, tensors(1.0), {"step": 1})
    path = folder / plain.name
    for one in plain.iterdir():
        (path / one.name).upload(one)
    checkpoints = CheckpointFolder(folder, Grid.single(CPU))
    assert checkpoints.newest() == path and read_state(path)["step"] == 1
    checkpoints.save(1, tensors(2.0), {"step": 1})
    assert {*path.names()} == {*manifest.read(path)[0], manifest.NAME}


def test_a_large_file_is_sent_in_parts(
    folder: StoragePath, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one fails, the whole is sent again; no more than the parts in flight is copied."""
    monkeypatch.setattr(storage_path, "PART_BYTES", 5 << 20)  # the smallest that S3 takes
    whole = torch.randint(256, (12 << 20,), dtype=torch.uint8)
    checkpoints = CheckpointFolder(folder, Grid.single(CPU))
    s3.set_faults({"method": "PUT", "path": "partNumber=2", "status": 503, "times": 1})
    before = len(s3.requests())
    path = checkpoints.save(1, {"w": whole, "a": torch.ones(3)}, {"step": 1})
    assert s3.applied() == [1]
    sent = [one for one in s3.requests()[before:] if "partNumber" in one]
    assert any("partNumber=3" in one for one in sent)
    assert checkpoints.newest() == path
    loaded = {"w": torch.zeros_like(whole), "a": torch.zeros(3)}
    checkpoints.load(path, loaded)
    assert torch.equal(loaded["w"], whole)


def test_parts_are_sliced_as_what_they_form() -> None:
    parts, text = Parts([b"abc", memoryview(b""), memoryview(b"defg"), b"h"]), b"abcdefgh"
    assert len(parts) == len(text) and bytes(parts) == text
    for start in range(9):
        for stop in range(start, 12):
            assert parts[start:stop] == text[start:stop]


def test_a_removal_that_fails_midway_leaves_no_checkpoint(
    folder: StoragePath, s3: S3Server
) -> None:
    checkpoints = CheckpointFolder(folder, Grid.single(CPU))
    checkpoints.save(1, tensors(), {"step": 1})
    path = checkpoints.save(2, tensors(), {"step": 2})
    s3.set_faults({"method": "POST", "path": "delete", "status": 503, "times": 10**6})
    problem = checkpoints.remove(path)
    assert problem is not None and problem.startswith(f"{path}: could not be removed: ")
    assert path.names() and saved_steps(folder) == ["step-00000001"]
    s3.set_faults()
    checkpoints.save(3, tensors(), {"step": 3})
    assert saved_steps(folder) == ["step-00000001", "step-00000003"] and not path.names()


def test_a_list_that_lags_behind(folder: StoragePath, s3: S3Server) -> None:
    checkpoints = CheckpointFolder(folder, Grid.single(CPU), keep=2)
    checkpoints.save(1, tensors(), {"step": 1})
    s3.set_faults({"method": "GET", "path": "list-type", "frozen": True, "times": 10**6})
    assert saved_steps(folder) == ["step-00000001"]
    for step in (2, 3, 4):
        checkpoints.save(step, tensors(), {"step": step})
        checkpoints.prune()
    assert saved_steps(folder) == ["step-00000003", "step-00000004"]
    newest = checkpoints.newest()
    assert newest is not None and newest.name == "step-00000004"


def test_one_byte(folder: StoragePath) -> None:
    checkpoints = CheckpointFolder(folder, Grid.single(CPU))
    checkpoints.save(1, tensors(), {"step": 1})
    path = checkpoints.save(2, tensors(), {"step": 2})
    (name,) = [name for name in path.names() if name.endswith("safetensors")]
    content = bytearray((path / name).read_bytes())
    content[-9] ^= 1
    (path / name).write(bytes(content))
    with pytest.raises(CheckpointError) as caught:
        checkpoints.newest()
    text = f"{path} is damaged: {name} was altered; the previous complete checkpoint is {folder}"
    assert str(caught.value).startswith(f"{text}/step-00000001")
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        checkpoints.newest()


def save_in_halves(
    rank: int, world_size: int, url: str, environment: dict[str, str]
) -> list[float]:
    os.environ.update(environment)  # the server of processes may be older than that of S3
    grid = Grid.build(Degrees(world_size), CPU)
    checkpoints = CheckpointFolder(StoragePath(url), grid)
    half = TensorBox(torch.full((4, 3), float(rank)), (8, 3), (4 * rank, 0))
    path = checkpoints.save(5, {"w": [half], "common": torch.ones(9)}, {"step": 5})
    assert checkpoints.newest() == path
    across = TensorBox(torch.zeros(8, 1), (8, 3), (0, rank))
    checkpoints.load(path, {"w": [across], "common": torch.zeros(9)})
    return across.tensor.flatten().tolist()


def test_two_ranks(folder: StoragePath, s3: S3Server) -> None:
    results = spawn(save_in_halves, 2, str(folder), s3.environment)
    assert results == [[0.0] * 4 + [1.0] * 4] * 2


def test_in_memory() -> None:
    """Any storage of fsspec will do."""
    folder = StoragePath("memory://bucket/run")
    checkpoints = CheckpointFolder(folder, Grid.single(CPU), keep=1)
    for step in (1, 2):
        checkpoints.save(step, tensors(), {"step": step})
        checkpoints.prune()
    assert saved_steps(folder) == ["step-00000002"]
    loaded = {name: torch.zeros_like(one) for name, one in tensors().items()}
    checkpoints.load(folder / "step-00000002", loaded)
    assert torch.equal(loaded["b"], torch.arange(7))
