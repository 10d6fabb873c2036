"""A run without progress is explained and ended, so that its launcher starts it again.

A thread in every rank watches that rank's heartbeat. The first to see that nothing has changed for
too long calls all ranks through the job's store. Each answers with what it does, and writes the
Python stacks of its threads and torch's flight record into `hangs` of the run folder; the caller
prints one paragraph, and the ranks end as after any failure. So it works in the same way under
`v4 train`, torchrun, Slurm and Kubernetes.

A rank whose thread cannot run, since foreign code holds Python's interpreter, does not answer. The
caller aborts those on its own host, which makes faulthandler print their stacks on stderr. A timer
of faulthandler, which needs no interpreter, ends a rank that nobody else misses.

The store is in the process of rank 0. Where that is stopped, or its host unreachable, calls of the
store block: another thread of each rank then ends it, and one rank of each host prints a paragraph.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch._C import _distributed_c10d
from torch.distributed import Store

from data.activity import print_line
from data.errors import DataError
from data.files import write_atomically
from trainer.config import WatchdogConfig
from trainer.process.exit_codes import FAILED
from trainer.process.failures import FailureWatch
from trainer.process.hang import RankReport, describe_hang, describe_rank
from trainer.process.heartbeat import Heartbeat, Stopwatch
from trainer.process.source import own_file

POLL_SECONDS = 1.0
BEAT_SECONDS = 10.0  # between signs of life in the store
ANSWER_SECONDS = 10.0  # until a rank that does not answer is silent
WRITE_SECONDS = 5.0  # for the files, whose file system may be what hangs
STORE_SECONDS = 30.0  # for one round of the thread; an answer and its files take 15 s
_INTERPRETER_SECONDS = 60.0  # that faulthandler waits beyond all patience
_STDERR = 2  # the number of its file
_WAITING_FILES = ("collectives.py", "waits.py")


class Watchdog:
    """Watches `heartbeat` from a thread, inside its `with` block.

    `failures`, which is connected, ends the ranks.
    """

    def __init__(
        self, config: WatchdogConfig, heartbeat: Heartbeat, run_dir: Path, failures: FailureWatch
    ) -> None:
        self.config, self.heartbeat, self.failures = config, heartbeat, failures
        self.folder = run_dir / "hangs"
        self._rank = failures.rank
        self._closed = threading.Event()
        self._calls = 0  # earlier ones, after which the run went on
        self._rounds = 0  # of the thread, each of which asks the store

    def __enter__(self) -> Watchdog:
        """Starts the thread, unless the config turns it off."""
        if self.config.seconds != 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
            if self._store is not None:
                threading.Thread(target=self._guard, name="store guard", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        """The body of the thread. A store that is gone ends the rank elsewhere (failures.py)."""
        stopwatch, next_beat = Stopwatch(2 * POLL_SECONDS), 0.0
        while not self._closed.wait(POLL_SECONDS):
            self._rounds += 1
            seconds = stopwatch.seconds(self.heartbeat.progress)
            patience = self.heartbeat.patience(self.config)
            with suppress(RuntimeError):
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + BEAT_SECONDS
                    self._beat(seconds, patience)
                is_overdue = seconds > patience and not self._is_another_slow(seconds, patience)
                if is_overdue and self._is_first_caller():
                    self._call(seconds)
                elif folder := self._called():
                    self._answer(folder, seconds)
                else:
                    continue
                stopwatch.restart()  # no other call before another wait

    def _guard(self) -> None:
        """Ends this rank where the store does not answer; runs in its own thread."""
        silence, stopwatch = Stopwatch(2 * POLL_SECONDS), Stopwatch(2 * POLL_SECONDS)
        while not self._closed.wait(POLL_SECONDS) and not self.failures.is_ending:
            silent = silence.seconds(self._rounds)
            seconds = stopwatch.seconds(self.heartbeat.progress)
            if silent > STORE_SECONDS and seconds > self.heartbeat.patience(self.config):
                self._end_without_store(silent, seconds)
                return

    def _end_without_store(self, silent: float, seconds: float) -> None:
        """Writes the stacks and ends this rank; prints why where it is the first of its host."""
        folder = self.folder / f"{time.strftime('%Y%m%d')}-step-{self.heartbeat.step}-without-store"
        report = self._report(seconds)
        self._write_stacks(folder, report)
        text = (
            f"v4: no progress for {seconds:.0f} s: rank 0, whose process on "
            f"{os.environ.get('MASTER_ADDR')} has the store of all ranks, has not answered for "
            f"{silent:.0f} s, as a process that is stopped, or a host that is away; "
            f"{describe_rank(report)}; the stacks of this host's ranks are in {folder}; they end, "
            "and restart from the newest checkpoint if they may"
        )
        self.failures.end_without_store(FAILED, text)

    def _beat(self, seconds: float, patience: float) -> None:
        """Leaves a sign of life for the other ranks, and sets the timer for this one."""
        if not self._closed.is_set():
            limit = max(patience, self.config.slow_seconds) + _INTERPRETER_SECONDS
            faulthandler.dump_traceback_later(limit, exit=True, file=_STDERR)
        if (store := self._store) is not None:
            store.set(self._key(f"beat/{self._rank}"), self._report(seconds).to_json())

    @property
    def _store(self) -> Store | None:
        return self.failures.store

    def _key(self, name: str) -> str:
        return f"{self.failures.key}/watchdog/{name}"

    def _is_another_slow(self, seconds: float, patience: float) -> bool:
        """Whether this rank may be waiting for one that does what may take longer.

        As the first rank, whose metrics go to a file server that is away.
        """
        if (store := self._store) is None or seconds > self.heartbeat.wait_limit:
            return False
        for rank in range(self.failures.world_size):
            if store.check([key := self._key(f"beat/{rank}")]):
                other = RankReport.from_json(store.get(key))
                if other.collective is None and other.patience > max(seconds, patience):
                    return True
        return False

    def _is_first_caller(self) -> bool:
        store = self._store
        return store is None or store.add(self._key(f"{self._calls}/callers"), 1) == 1

    def _called(self) -> str:
        """Returns the folder for the stacks if a rank has called, else an empty text."""
        store, key = self._store, self._key(f"{self._calls}/folder")
        return store.get(key).decode() if store is not None and store.check([key]) else ""

    def _call(self, seconds: float) -> None:
        """Calls all ranks, prints what they answer, and ends them unless this one has gone on."""
        before = self.heartbeat.progress
        folder = f"{time.strftime('%Y%m%d-%H%M%S')}-step-{self.heartbeat.step}"
        number, store = self._calls, self._store
        if store is not None:
            store.set(self._key(f"{number}/folder"), folder)
        self._answer(folder, seconds)
        reports, silent = self._answers(number, seconds)
        text = (
            f"v4: no progress for {seconds:.0f} s: {describe_hang(reports, silent)}; Python's "
            f"stacks and torch's flight records are in {self.folder / folder}"
        )
        if self.heartbeat.progress != before:
            print_line(f"{text}; rank {self._rank} has gone on since, and so does the run")
            return
        host = socket.gethostname()
        self.failures.end_all(
            FAILED,
            f"{text}; all ranks end, and restart from the newest checkpoint if they may",
            abort=[last.pid for last in silent.values() if last is not None and last.host == host],
        )

    def _answer(self, folder: str, seconds: float) -> None:
        report = self._report(seconds)
        self._write_stacks(self.folder / folder, report)
        if (store := self._store) is not None:
            store.set(self._key(f"{self._calls}/report/{self._rank}"), report.to_json())
        self._calls += 1

    def _write_stacks(self, folder: Path, report: RankReport) -> None:
        writer = threading.Thread(target=_write, args=(folder, report), daemon=True)
        writer.start()
        writer.join(WRITE_SECONDS)

    def _answers(
        self, number: int, seconds: float
    ) -> tuple[dict[int, RankReport], dict[int, RankReport | None]]:
        """Returns the reports of the ranks, and the last signs of those that do not answer."""
        store = self._store
        if store is None:
            return {self._rank: self._report(seconds)}, {}
        ranks = range(self.failures.world_size)
        keys = [self._key(f"{number}/report/{rank}") for rank in ranks]
        deadline = time.monotonic() + ANSWER_SECONDS
        while not store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.1)
        reports: dict[int, RankReport] = {}
        silent: dict[int, RankReport | None] = {}
        for rank, key in zip(ranks, keys, strict=True):
            beat = self._key(f"beat/{rank}")
            if store.check([key]):
                reports[rank] = RankReport.from_json(store.get(key))
            else:
                last = store.get(beat) if store.check([beat]) else None
                silent[rank] = None if last is None else RankReport.from_json(last)
        return reports, silent

    def _report(self, seconds: float) -> RankReport:
        beat = self.heartbeat
        return RankReport(
            self._rank,
            socket.gethostname(),
            os.getpid(),
            beat.task,
            beat.step,
            seconds,
            beat.patience(self.config),
            beat.collective,
            place(),
        )


def place() -> str:
    """Returns `trainer/engine.py, line 80, in forward`: the innermost call of ours that is running.

    The functions around a collective are left out. Empty where none of ours runs.
    """
    frame: Any = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        file = own_file(frame.f_code.co_filename)
        if file is not None and file.name not in _WAITING_FILES:
            return f"{file}, line {frame.f_lineno}, in {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


def _write(folder: Path, report: RankReport) -> None:
    """Writes the stacks of this process, and what torch recorded of its collectives."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        stacks = file.read()
    with suppress(OSError, DataError):
        head = f"rank {report.rank} on {report.host}, pid {report.pid}: {report.during}\n\n"
        write_atomically(folder / f"rank-{report.rank:05d}.txt", head.encode() + stacks)
        for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # by the build of torch
            if (dump := getattr(_distributed_c10d, name, None)) is not None:
                kind = name.split("_")[2]
                write_atomically(folder / f"rank-{report.rank:05d}.{kind}.json", dump())
