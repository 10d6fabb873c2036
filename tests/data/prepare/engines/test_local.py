"""Tasks in processes of this machine: killed, failing, and ended with the command."""

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data.config import DataConfig
from data.errors import DataError
from data.prepare.engines import engine, local, open_engine
from data.prepare.task import Preparation, Task
from data.text import Tokenizer
from tests.data.kills import until
from tests.distributed import server

Advance = Callable[[int], None]


class Write(Task):
    """Writes its file after its process died, or its disk failed, as often as its mode says."""

    deaths: int = 0
    failures: int = 0
    error: str = ""

    def is_done(self, folder: Path) -> bool:
        return (folder / self.name).exists()

    def run(self, preparation: Preparation, advance: Advance) -> None:
        with (preparation.folder / f"{self.name}.attempts").open("a") as stream:
            attempt = stream.write("x") and stream.tell()
        if attempt <= self.deaths:
            os._exit(1)
        if attempt <= self.failures:
            raise OSError(5, "Input/output error")
        if self.error:
            raise DataError(self.error)
        (preparation.folder / self.name).touch()
        advance(self.size)


class Wait(Task):
    """Never ends."""

    def is_done(self, folder: Path) -> bool:
        return False

    def run(self, preparation: Preparation, advance: Advance) -> None:
        (preparation.folder / f"{os.getpid()}.pid").touch()
        time.sleep(600)


def run(config: DataConfig, folder: Path, tasks: list[Task], workers: int) -> None:
    tokenizer = Tokenizer(config.tokenizer.path)
    config = config.model_copy(update={"prepare_workers": workers})
    open_engine(Preparation(config, folder, (), lambda: tokenizer), False).run(tasks, "write")


def attempts(folder: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_size for path in folder.glob("*.attempts")}


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    server()
    monkeypatch.setattr(engine, "_BYTES_PER_PROCESS", 1)


@pytest.mark.usefixtures("several")
def test_a_process_that_dies_costs_its_task_only(config: DataConfig, tmp_path: Path) -> None:
    tasks: list[Task] = [Write(name=f"w{i}", size=1, deaths=2 * (i == 1)) for i in range(4)]
    run(config, tmp_path, tasks, 2)
    assert attempts(tmp_path) == {"w0": 1, "w1": 3, "w2": 1, "w3": 1}
    (tmp_path / "w2").unlink()
    run(config, tmp_path, tasks, 2)
    assert attempts(tmp_path) == {"w0": 1, "w1": 3, "w2": 2, "w3": 1}


@pytest.mark.usefixtures("several")
def test_a_process_that_dies_each_time(config: DataConfig, tmp_path: Path) -> None:
    tasks: list[Task] = [Write(name=f"w{i}", size=1, deaths=9 * (i == 1)) for i in range(4)]
    with pytest.raises(DataError, match=r"w1: a process .* was killed, perhaps .*, in 3 attempts"):
        run(config, tmp_path, tasks, 2)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("several")
def test_failures(config: DataConfig, tmp_path: Path, workers: int) -> None:
    tasks: list[Task] = [Write(name="w0", size=1, failures=2), Write(name="w1", size=1)]
    run(config, tmp_path, tasks, workers)
    assert attempts(tmp_path) == {"w0": 3, "w1": 1}
    tasks = [Write(name="w2", size=1, failures=9), Write(name="w3", size=1)]
    with pytest.raises(OSError, match=r"w2: Input/output error, in 3 attempts"):
        run(config, tmp_path, tasks, workers)
    tasks = [Write(name="w4", size=1, error="line 3 is bad"), Write(name="w5", size=1)]
    with pytest.raises(DataError, match=r"^line 3 is bad$"):
        run(config, tmp_path, tasks, workers)
    assert attempts(tmp_path)["w4"] == 1


def _two_that_wait(config: DataConfig, folder: Path) -> None:
    """Like the command, but with forked processes, which need no second server."""
    engine._BYTES_PER_PROCESS = 1
    forked = multiprocessing.get_context("fork")
    local.multiprocessing.get_context = lambda _: forked  # type: ignore[attr-defined]
    run(config, folder, [Wait(name=f"w{i}", size=1) for i in range(2)], 2)


def test_no_process_outlives_the_command(config: DataConfig, tmp_path: Path) -> None:
    command = server().Process(target=_two_that_wait, args=(config, tmp_path))
    command.start()
    try:
        until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    finally:
        command.kill()
        command.join()
    until(lambda: not any(runs(int(file.stem)) for file in tmp_path.glob("*.pid")))


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
