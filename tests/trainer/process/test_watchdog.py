"""Ranks that watch each other: here as threads of one process, over one store."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from trainer.config import WatchdogConfig
from trainer.parallel.waits import Collective, Waits
from trainer.process import watchdog
from trainer.process.exit_codes import FAILED
from trainer.process.failures import FailureWatch
from trainer.process.heartbeat import Heartbeat, Task
from trainer.process.source import own_file
from trainer.process.watchdog import Watchdog

RANKS = 3
CONFIG = WatchdogConfig(seconds=0.5, slow_seconds=60.0)


class Rank:
    """One rank, whose end is recorded."""

    def __init__(self, rank: int, store: HashStore | None, folder: Path, ranks: int) -> None:
        self.ends: list[tuple[int, str]] = []
        self.heartbeat, self.waits = Heartbeat(), Waits(torch.device("cpu"))
        self.heartbeat.follow(self.waits, math.inf)
        failures = FailureWatch()
        failures.rank, failures.world_size, failures.store = rank, ranks, store
        failures.end_without_store = lambda code, text: self.ends.append((code, text))  # type: ignore[method-assign]
        failures.end_all = lambda code, text, abort: self.ends.append((code, text))  # type: ignore[method-assign]
        self.watchdog = Watchdog(CONFIG, self.heartbeat, folder, failures)
        for step in range(1, 4):
            self.heartbeat.enter("forward and backward", step)
            self.heartbeat.step_ended(0.1)

    @contextmanager
    def waiting(self, name: str = "all_reduce") -> Iterator[None]:
        ranks = tuple(range(self.watchdog.failures.world_size))
        with self.waits.during(Collective(name, "world", ranks, 7)):
            yield


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Rank]]]:
    """Makes ranks that are watched; `silent` are not."""
    monkeypatch.setattr(watchdog, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(watchdog, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(watchdog, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    with ExitStack() as stack:

        def make(count: int = RANKS, silent: tuple[int, ...] = ()) -> list[Rank]:
            store = HashStore() if count > 1 else None
            made = [Rank(rank, store, tmp_path, count) for rank in range(count)]
            for rank, one in enumerate(made):
                if rank not in silent:
                    stack.enter_context(one.watchdog)
            return made

        yield make


def ends_of(ranks: list[Rank], seconds: float = 10.0) -> list[tuple[int, str]]:
    """Waits for the first end; returns all."""
    deadline = time.monotonic() + seconds
    while not any(rank.ends for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [end for rank in ranks for end in rank.ends]


def test_all_ranks_are_named_and_leave_their_stacks(
    ranks: Callable[..., list[Rank]], tmp_path: Path
) -> None:
    first, _, third = made = ranks()
    with first.waiting(), third.waiting():
        ((code, text),) = ends_of(made)
    assert code == FAILED
    assert text.startswith("v4: no progress for ") and ") for rank 1; rank 1 on " in text
    assert "is in no collective but in step 3, forward and backward" in text
    (folder,) = (tmp_path / "hangs").iterdir()
    stacks = [(folder / f"rank-{rank:05d}.txt").read_text() for rank in range(RANKS)]
    assert all("test_watchdog.py" in text and "step 3" in text for text in stacks)
    assert len(list(folder.glob("*.fr.json"))) == RANKS


def test_stacks_that_cannot_be_written_are_left_out(
    ranks: Callable[..., list[Rank]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hangs").write_text("a file")
    errors: list[object] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    assert ends_of(ranks(1)) and not errors


def test_a_rank_without_a_thread_is_silent(ranks: Callable[..., list[Rank]]) -> None:
    first, _, third = made = ranks(silent=(1,))
    with first.waiting(), third.waiting():
        ((_, text),) = ends_of(made)
    assert ") for rank 1; rank 1 has given no sign of life" in text


@pytest.mark.parametrize("task", ["metrics", "saving", "reading data"])
def test_ranks_that_wait_for_a_file_have_its_patience(
    task: Task, ranks: Callable[..., list[Rank]]
) -> None:
    first, second, third = made = ranks()
    second.heartbeat.enter(task)
    time.sleep(0.3)  # until all know
    with first.waiting(), third.waiting():
        assert ends_of(made, seconds=1.5) == []


def test_a_run_that_goes_on_is_not_ended(
    ranks: Callable[..., list[Rank]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made = ranks(silent=(1,))
    first, _, third = made
    with first.waiting(), third.waiting():
        while not (tmp_path / "hangs").exists():
            time.sleep(0.02)
    for _ in range(30):  # while the caller still waits for the silent rank
        for rank in made:
            rank.heartbeat.enter("update")
        time.sleep(0.05)
    assert ends_of(made, seconds=0.1) == []
    assert "has gone on since, and so does the run" in capsys.readouterr().out


class StuckStore:
    """The store of a process that is stopped: calls last until the test ends."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*_: object) -> None:
            self.closed.wait(60.0)
            raise RuntimeError("the store is gone")

        return call


def test_a_store_that_does_not_answer(
    ranks: Callable[..., list[Rank]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends ranks that wait, with their stacks, and no rank that goes on."""
    monkeypatch.setattr(watchdog, "STORE_SECONDS", 0.5)
    store = StuckStore()
    waits, goes_on = (Rank(rank, store, tmp_path, RANKS) for rank in (1, 2))  # type: ignore[arg-type]
    with waits.watchdog, goes_on.watchdog, waits.waiting():
        for _ in range(20):
            goes_on.heartbeat.enter("update")
            time.sleep(0.1)
        store.closed.set()
    ((code, text),) = waits.ends
    assert code == FAILED and not goes_on.ends
    assert ": rank 0, whose process on " in text and "has not answered for " in text
    assert "; rank 1 on " in text and " waits in all_reduce number 7 over the axis world" in text
    (folder,) = (tmp_path / "hangs").iterdir()
    assert folder.name.endswith("-step-3-without-store")
    assert "test_watchdog.py" in (folder / "rank-00001.txt").read_text()


def test_an_environment_inside_the_project_is_not_ours() -> None:
    root = Path(watchdog.__file__).parents[2]
    torch_file = "lib/python3.11/site-packages/torch/distributed/distributed_c10d.py"
    assert own_file(str(root / "trainer/engine.py")) == Path("trainer/engine.py")
    assert own_file(str(root / ".venv" / torch_file)) is None
    assert own_file(str(root / "torch/distributed/distributed_c10d.py")) is None
    assert own_file("/usr/lib/python3.11/threading.py") is None


def test_a_process_alone_is_watched_and_can_turn_it_off(
    ranks: Callable[..., list[Rank]], tmp_path: Path
) -> None:
    (alone,) = ranks(1)
    ((_, text),) = ends_of([alone])
    assert "rank 0 on " in text and "is in no collective but in step 3" in text
    before = threading.active_count()
    off = WatchdogConfig(seconds=0.0)
    with Watchdog(off, alone.heartbeat, tmp_path, alone.watchdog.failures):
        assert threading.active_count() == before
