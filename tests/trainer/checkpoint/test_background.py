"""Saving beside training: what is saved, who waits, what a killed process leaves."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from data.processes import is_running
from tests.distributed import spawn
from tests.trainer.tiny import assert_same_run, column, train
from trainer import save_mode
from trainer.__main__ import main
from trainer.checkpoint import background, writer_process
from trainer.checkpoint.background import BackgroundSaves
from trainer.checkpoint.folder import CheckpointFolder, as_boxes, checkpoints_in, step_of
from trainer.checkpoint.layout import ALIGNMENT
from trainer.checkpoint.logical_tensors import Boxes
from trainer.checkpoint.rank_files import NewCheckpoint, write_outcome
from trainer.checkpoint.shared_memory import SharedMemory
from trainer.checkpoint.store import open_store
from trainer.checkpoint.unsaved import NEWEST_FILE
from trainer.checkpoint.writer_process import Request, is_readable
from trainer.config import ConfigError, load_config
from trainer.config.published import is_published
from trainer.parallel.grid import Degrees, Grid
from trainer.planning import checkpoint_copy_memory
from trainer.process.errors import CheckpointError, PreflightError
from trainer.save_mode import choose_save_mode
from trainer.trainer import Trainer

Tensors = dict[str, torch.Tensor]
Single = tuple[CheckpointFolder, Boxes, BackgroundSaves]


def tensors_of(value: float, size: int = 1000) -> Tensors:
    return {f"t{i}": torch.full((size,), value + i) for i in range(8)}


@pytest.fixture
def single(tmp_path: Path) -> Iterator[Single]:
    """A folder, eight tensors, and the saves of one process."""
    tensors = tensors_of(1.0)
    checkpoints = CheckpointFolder(tmp_path, Grid.single())
    saves = BackgroundSaves(checkpoints, as_boxes(tensors))
    yield checkpoints, as_boxes(tensors), saves
    saves.close()


def writer_of(saves: BackgroundSaves) -> psutil.Process:
    assert saves._writer is not None
    return psutil.Process(saves._writer.pid)


def test_a_run_saves_the_same_bytes_in_both_modes(tiny: Path, tmp_path: Path) -> None:
    """Also the losses, whatever is written meanwhile."""
    hashes = []
    for mode in ("async", "sync"):
        train(tiny, tmp_path / mode, "checkpoint={every: 2, keep: 0}", f"checkpoint.mode={mode}")
        folders = checkpoints_in(tmp_path / mode / "checkpoints")
        assert [path.name[-1] for path in folders] == ["2", "4", "6"]
        files = [json.loads((path / "manifest.json").read_text())["files"] for path in folders]
        hashes.append([{n: r for n, r in f.items() if n != "state.json"} for f in files])
        assert {path.name for path in folders[0].iterdir()} == {*files[0], "manifest.json"}
    assert hashes[0] == hashes[1]
    assert_same_run(tmp_path / "sync", tmp_path / "async", 6)
    train(tiny, tmp_path / "async", "steps=7")
    assert len(column(tmp_path / "async", "loss")) == 7


def test_steps_go_on_while_the_copy_is_written(single: Single) -> None:
    checkpoints, boxes, saves = single
    writer = writer_of(saves)
    writer.suspend()
    start = time.monotonic()
    path = saves.begin(1, boxes, {"step": 1})
    assert time.monotonic() - start < 5.0
    for some in boxes.values():
        some[0].tensor.zero_()  # the next update
    assert saves.is_writing and checkpoints_in(checkpoints.folder) == []
    assert saves.reports() == []
    writer.resume()
    assert saves.finish() and not saves.is_writing
    (report,) = saves.reports()
    assert (report.path, report.problem) == (path, None)
    loaded = tensors_of(0.0)
    checkpoints.load(path, loaded)
    assert [float(t[-1]) for t in loaded.values()] == [1.0 + i for i in range(8)]


def test_a_step_that_is_saved_again_is_replaced_at_once(
    single: Single, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever takes long to remove: a kill meanwhile leaves the old one or the new one."""
    checkpoints, boxes, _ = single
    target, plain = checkpoints.save(1, boxes, {"step": 1}), shutil.rmtree
    published = []

    def remove(path: Path, ignore_errors: bool = False) -> None:
        published.append(is_published(target))
        plain(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", remove)
    assert checkpoints.save(1, boxes, {"step": 1}) == target
    assert published and all(published)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000001"]


def test_a_kill_between_two_renames_loses_nothing(tiny: Path, tmp_path: Path) -> None:
    """Of a step that is saved again; what was put aside is the newest until the run goes on."""
    train(tiny, tmp_path, "steps=4", "checkpoint={every: 2, keep: 0}")
    older, newest = checkpoints_in(tmp_path / "checkpoints")
    aside = newest.rename(newest.with_name(f".{newest.name}.replaced"))
    assert checkpoints_in(tmp_path / "checkpoints") == [older, aside] and step_of(aside) == 4
    assert main([str(tmp_path)]) == 0, "no step is left"
    assert checkpoints_in(tmp_path / "checkpoints") == [older, newest]
    newest.rename(aside)
    train(tiny, tmp_path, "steps=6", "checkpoint={every: 5, keep: 0}")
    steps = [step_of(path) for path in checkpoints_in(tmp_path / "checkpoints")]
    assert steps == [2, 4, 5, 6] and len(column(tmp_path, "loss")) == 6


def test_a_removed_checkpoint_stays_removed(tmp_path: Path) -> None:
    """A kill has left the one that it replaced."""
    checkpoints = CheckpointFolder(tmp_path, Grid.single())
    path = checkpoints.save(1, tensors_of(1.0), {"step": 1})
    shutil.copytree(path, path.with_name(f".{path.name}.replaced"))
    assert checkpoints.remove(path) is None
    assert checkpoints_in(tmp_path) == []


def test_a_writer_that_was_killed_after_it_published(
    single: Single, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, boxes, saves = single
    saves.begin(1, boxes, {"step": 1})

    def receive(timeout: float | None) -> None:
        while not is_published(checkpoints.path_of(1)):
            time.sleep(0.01)
        raise OSError("it has ended")

    monkeypatch.setattr(saves._writer, "receive", receive)
    assert saves.finish()
    (report,) = saves.reports()
    assert report.problem is None and checkpoints.newest() == report.path


def test_a_writer_that_was_stopped_leaves_another_ones_files_alone(single: Single) -> None:
    """Another process has taken the run over, and is at the same step."""
    checkpoints, boxes, saves = single
    writer = writer_of(saves)
    writer.suspend()
    saves.begin(1, boxes, {"step": 1})
    other = CheckpointFolder(checkpoints.folder, Grid.single()).begin(1)
    writer.resume()
    assert not saves.finish()
    assert isinstance(other.folder, Path) and list(other.folder.iterdir()) == []


def test_the_next_save_waits_for_the_one_before(single: Single) -> None:
    checkpoints, boxes, saves = single
    writer = writer_of(saves)
    writer.suspend()
    saves.begin(1, boxes, {"step": 1})
    threading.Timer(1.0, writer.resume).start()
    saves.begin(2, boxes, {"step": 2})
    assert saves.waited > 0.5
    assert [path.name[-1] for path in checkpoints_in(checkpoints.folder)][:1] == ["1"]
    assert saves.finish()
    assert len(checkpoints_in(checkpoints.folder)) == 2


def test_a_killed_writer_is_a_failed_save(single: Single) -> None:
    """The checkpoint before stays; the next save has a process again."""
    checkpoints, boxes, saves = single
    saves.begin(1, boxes, {"step": 1})
    assert saves.finish()
    writer = writer_of(saves)
    writer.suspend()
    saves.begin(2, boxes, {"step": 2})
    writer.kill()
    assert not saves.finish()
    problems = [report.problem for report in saves.reports()]
    assert problems[0] is None and "step-00000002: the checkpoint could not be" in problems[1]
    assert "the process that writes checkpoints has ended" in problems[1]
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000001"]
    saves.begin(3, boxes, {"step": 3})
    assert saves.finish() and len(checkpoints_in(checkpoints.folder)) == 2


KILLED = """
import sys, time, torch
from pathlib import Path
from trainer.checkpoint import background
from trainer.checkpoint.background import BackgroundSaves
from trainer.checkpoint.folder import CheckpointFolder, as_boxes, checkpoints_in
from trainer.parallel.grid import Grid

folder = CheckpointFolder(Path(sys.argv[1]), Grid.single())
boxes = as_boxes({"t": torch.ones(1000)})
saves = BackgroundSaves(folder, boxes)
saves.begin(1, boxes, {"step": 1})
assert saves.finish()
import psutil
psutil.Process(saves._writer.pid).suspend()
saves.begin(2, boxes, {"step": 2})
print(saves._writer.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_the_writer_ends_with_its_rank(tmp_path: Path) -> None:
    """Killed in the middle of a save, where it cannot notice the end of its input."""
    rank = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE)
    assert rank.stdout is not None
    writer = psutil.Process(int(rank.stdout.readline()))
    rank.kill()
    rank.wait()
    deadline = time.monotonic() + 10
    while is_running(writer) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(writer)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000001"]


def test_pipes_may_have_any_number() -> None:
    """A process with many connections and shards has none below 1024 left."""
    process, limits = psutil.Process(), psutil.Process().rlimit(psutil.RLIMIT_NOFILE)
    process.rlimit(psutil.RLIMIT_NOFILE, (min(4096, limits[1]), limits[1]))
    read, write = os.pipe()
    os.dup2(read, 2000)
    try:
        assert not is_readable(2000, 0.01)
        os.write(write, b"x")
        assert is_readable(2000, None)
    finally:
        for handle in (read, write, 2000):
            os.close(handle)
        process.rlimit(psutil.RLIMIT_NOFILE, limits)


def test_the_writer_ignores_the_signals_of_a_job(single: Single) -> None:
    _, boxes, saves = single
    saves.begin(1, boxes, {"step": 1})
    assert saves.finish(), "it has started"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(writer_of(saves).pid, number)
    saves.begin(2, boxes, {"step": 2})
    assert saves.finish()


def save_where_one_rank_has_no_room(rank: int, world_size: int, folder: Path) -> list[str | None]:
    grid = Grid.build(Degrees(world_size), torch.device("cpu"))
    checkpoints, boxes = CheckpointFolder(folder, grid), as_boxes(tensors_of(1.0))
    saves = BackgroundSaves(checkpoints, boxes)
    done = []
    for step in (1, 2, 3):
        room = 2_000 if (step, rank) == (2, 1) else psutil.RLIM_INFINITY
        writer_of(saves).rlimit(psutil.RLIMIT_FSIZE, (room, psutil.RLIM_INFINITY))
        saves.begin(step, boxes, {"step": step})
        done.append(saves.finish())
    assert done == [True, False, True]
    saves.close()
    loaded = tensors_of(0.0)
    checkpoints.load(folder / "step-00000003", loaded)
    assert [int(tensor[-1]) for tensor in loaded.values()] == list(range(1, 9))
    return [report.problem for report in saves.reports()]


def test_one_rank_without_room_fails_the_save_of_all(tmp_path: Path) -> None:
    problems = spawn(save_where_one_rank_has_no_room, 2, tmp_path)[0]
    assert problems[0] is None
    assert "step-00000002" in problems[1] and "rank 1: File too large" in problems[1]
    assert f"the newest complete one is {tmp_path / 'step-00000001'}" in problems[1]
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000001", "step-00000003"]
    assert not list(tmp_path.glob(".*"))


def test_a_failed_save_is_counted_and_the_run_goes_on(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is removed for a checkpoint that does not exist."""
    settings = [f"run_dir={tmp_path}", "steps=5", "checkpoint={every: 1, keep: 1, mode: async}"]
    trainer = Trainer(load_config(tiny, settings), Grid.single())

    def kill(state: object, result: object) -> None:
        saves = trainer.checkpoint.background
        assert saves is not None
        if trainer.state.step == 2:
            saves.finish()
            writer_of(saves).suspend()
        if trainer.state.step == 3:
            writer_of(saves).kill()

    trainer.periodic.insert(0, kill)
    trainer.run()
    output = capsys.readouterr().out
    assert "warning: " in output and "training continues" in output
    assert column(tmp_path, "failed_saves") == [0, 0, 0, 1, 1]
    assert [path.name for path in checkpoints_in(tmp_path / "checkpoints")] == ["step-00000005"]


def test_a_first_save_in_flight_does_not_count_as_lost(tiny: Path, tmp_path: Path) -> None:
    """Killed long after it was due, before it was published."""
    train(tiny, tmp_path, "steps=5", "checkpoint.every=3", stop_at=5)
    (tmp_path / NEWEST_FILE).write_text("")
    for path in checkpoints_in(tmp_path / "checkpoints"):
        path.rename(path.with_name(f".{path.name}.tmp"))
    train(tiny, tmp_path, "steps=6", "checkpoint.every=3")
    assert len(column(tmp_path, "loss")) == 6


def test_a_later_checkpoint_that_stays_is_no_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of steps that were undone are removed after the new one is published."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(writer_process, "remove_later", fail)
    new = NewCheckpoint(1, open_store(tmp_path).begin(1, "0a"), "0a")
    write_outcome(new, 0, {"files": {}})
    request = Request(str(tmp_path), 1, str(new.folder), "0a", [], 0, 1, {"step": 1})
    assert writer_process._publish(new, request, lambda seconds: True) is None
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000001"]
    warning = "warning: .*: checkpoints after step 1 could not be removed: Directory not empty"
    assert re.search(warning, capsys.readouterr().err)


def test_a_reason_left_between_the_last_look_and_the_abort_is_given(tmp_path: Path) -> None:
    """The other rank leaves it before it says that it has failed; the abort may be seen first."""
    new = NewCheckpoint(1, open_store(tmp_path).begin(1, "0a"), "0a")
    write_outcome(new, 0, {"files": {}})
    request = Request(str(tmp_path), 1, str(new.folder), "0a", [], 0, 2, {"step": 1})

    def is_aborted(seconds: float) -> bool:
        write_outcome(new, 1, {"errno": errno.EFBIG, "reason": "File too large"})
        return True

    failure = writer_process._publish(new, request, is_aborted)
    assert failure is not None and (failure.rank, failure.reason) == (1, "File too large")


def test_memory_decides_the_mode(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(tiny, ["checkpoint.every=2"])
    mode = choose_save_mode(config, Grid.single())
    assert mode.is_async and "written beside training, for which a process takes at" in mode.message
    monkeypatch.setattr(save_mode, "available_memory", lambda device: 2**20)
    mode = choose_save_mode(config, Grid.single())
    assert not mode.is_async and mode.message.startswith("steps stop while a checkpoint is written")
    demanding = load_config(tiny, ["checkpoint={every: 2, mode: async}"])
    with pytest.raises(PreflightError, match=r"mode = async: .* set checkpoint\.mode=sync"):
        choose_save_mode(demanding, Grid.single())
    assert choose_save_mode(load_config(tiny, []), Grid.single()).is_async, "no copy is needed"


def test_the_copy_takes_what_was_planned(tiny: Path, tmp_path: Path) -> None:
    """On one process, which writes everything that it holds."""
    for precision in ("fp32", "bf16"):
        settings = ["checkpoint={every: 2, mode: async}", f"precision={precision}"]
        config = load_config(tiny, [f"run_dir={tmp_path / precision}", *settings])
        trainer = Trainer(config, Grid.single())
        trainer.checkpoint.save_beside_training()
        assert trainer.checkpoint.background is not None
        planned = checkpoint_copy_memory(config, config.degrees(1))
        assert planned <= trainer.checkpoint.background.nbytes < planned + ALIGNMENT
        trainer.checkpoint.close()
        trainer.batches.close()


def test_deepspeed_saves_while_steps_stop(tiny: Path) -> None:
    block = ("deepspeed={optimizer: {type: AdamW}}", "optim.matrix_optimizer=adamw")
    with pytest.raises(ConfigError, match=r"checkpoint\.mode = async is not supported with engine"):
        load_config(tiny, ["engine=deepspeed", *block, "checkpoint.mode=async"])


def test_memory_that_cannot_be_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as missing memory, and nothing of it is left."""

    def fail(*_: object, **__: object) -> None:
        raise RefusedError

    class RefusedError(torch.cuda.CudaError):
        def __init__(self) -> None:
            RuntimeError.__init__(self, "out of memory (2)")

    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", fail)
    monkeypatch.setattr(torch, "ones", fail)
    before = psutil.Process().num_fds()
    with pytest.raises(OSError, match="page-locking failed: out of memory") as error:
        SharedMemory(1000, torch.device("cuda"))
    assert error.value.errno == errno.ENOMEM
    assert psutil.Process().num_fds() == before


def test_memory_that_is_not_there(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was there when the run was planned."""

    def fail(nbytes: int, device: torch.device) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(background, "SharedMemory", fail)
    train(tiny, tmp_path, "steps=3", "checkpoint.every=2")
    assert "beside training could not be allocated: Cannot allocate" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"checkpoint\.mode = async: the memory for saving"):
        train(tiny, tmp_path, "steps=9", "checkpoint={every: 2, mode: async}")
