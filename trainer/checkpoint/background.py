"""Saving beside training: the state is copied to host memory, and another process writes it.

Steps stop for the copy alone. Each rank copies the boxes that it writes into memory that it shares
with a process of its own (writer_process.py), which writes, hashes and syncs the files while steps
go on; the first rank's process publishes once those of all ranks are on the disk. The ranks learn
what became of a save when they meet at the next one; the first rank as soon as it is published. One
save is in flight: the next one waits for it.

torch's own `async_save` is not used; layout.py says why.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from data.activity import Activity
from data.lease import LeaseError
from data.storage import AnyPath
from trainer.checkpoint.all_ranks import on_all_ranks
from trainer.checkpoint.folder import CheckpointFolder, as_document
from trainer.checkpoint.layout import LocalTensors, PlannedFile
from trainer.checkpoint.logical_tensors import Boxes
from trainer.checkpoint.rank_files import NewCheckpoint
from trainer.checkpoint.shared_memory import SharedMemory, needed_bytes, places
from trainer.checkpoint.writer_process import (
    POLL_SECONDS,
    Answer,
    FileInMemory,
    Request,
    WriterProcess,
)
from trainer.parallel.collectives import all_gather_objects
from trainer.process.errors import SaveError

END_SECONDS = 10.0
"""For a save in flight when an error ends the run."""
_LAST = {"published", "failed", "lost"}


@dataclass(frozen=True)
class SaveReport:
    """What became of a save.

    Attributes:
        path: the checkpoint.
        problem: a sentence where it could not be written.
        pause: seconds in which steps stopped for the copy.
        seconds: from the copy to the end.
    """

    path: AnyPath
    problem: str | None
    pause: float
    seconds: float


class BackgroundSaves:
    """The saves of a run, one at a time. All ranks make it, with their boxes as they are now.

    It allocates the memory and starts the process. Raises OSError on all ranks where one of them
    cannot.
    """

    def __init__(self, folder: CheckpointFolder, boxes: Boxes) -> None:
        self.folder, self.grid = folder, folder.grid
        self._new: NewCheckpoint | None = None
        self._answers: list[Answer] = []
        self._reports: list[SaveReport] = []
        self._failure: OSError | None = None
        self._pause = 0.0
        self.waited = 0.0
        """Seconds that the last `begin` waited for the save before."""
        self._memory: SharedMemory | None = None
        self._writer: WriterProcess | None = None
        files = folder.planner.plan(boxes)
        on_all_ranks(lambda: self._make_room(files), self.grid.world)

    @property
    def nbytes(self) -> int:
        """Bytes of the copy that this rank keeps of a checkpoint."""
        return 0 if self._memory is None else self._memory.nbytes

    def begin(self, step: int, boxes: Boxes, state: dict[str, Any]) -> AnyPath:
        """Copies the boxes, and returns the checkpoint's folder, which will be published.

        Waits for the save before. Raises SaveError on all ranks where the copy, or the temporary
        folder, is impossible.
        """
        start = time.monotonic()
        with Activity("waiting for the checkpoint before", visible=self.grid.is_first):
            self.finish()
        self.waited = time.monotonic() - start
        files, tensors = self.folder.planner.plan(boxes), LocalTensors(boxes)

        def copy() -> None:
            self._make_room(files)
            assert self._memory is not None
            self._memory.fill(files, tensors)

        try:
            new = self.folder.begin(step, copy)
        except OSError as error:
            problem = self.folder.save_problem(self.folder.path_of(step), error)
            raise SaveError(problem) from None
        self._new, self._answers, self._failure = new, [], None
        self._send(new, files, as_document(state))
        self._pause = time.monotonic() - start - self.waited
        return self.folder.path_of(step)

    def _make_room(self, files: list[PlannedFile]) -> None:
        """Allocates memory for the files where there is too little, and starts a process for it."""
        needed = needed_bytes(files)
        if self._memory is not None and self._memory.nbytes < needed:
            self._close(kill=False)
        if self._memory is None:
            self._memory = SharedMemory(needed, self.grid.device)
        if self._writer is None:
            self._writer = WriterProcess((self._memory.handle, self._memory.nbytes))

    def _send(self, new: NewCheckpoint, files: list[PlannedFile], state: dict[str, Any]) -> None:
        assert self._writer is not None
        request = Request(
            str(self.folder.folder),
            new.step,
            str(new.folder),
            new.token,
            [FileInMemory(f.name, f.header, at, at + f.nbytes) for f, at in places(files)],
            self.grid.rank,
            self.grid.world_size,
            state if self.grid.is_first else None,
            list(self.folder.leases),
        )
        try:
            self._writer.send(request)
        except OSError as error:
            self._lose_writer(error)

    @property
    def is_writing(self) -> bool:
        """Whether a save is in flight, as far as this rank knows."""
        self._receive(0.0)
        return self._new is not None and not self._is_over

    @property
    def _is_over(self) -> bool:
        """Whether this rank's process is done with the save."""
        last = _LAST if self.grid.is_first else {*_LAST, "written"}
        return any(answer.event in last for answer in self._answers)

    def _receive(self, timeout: float | None) -> None:
        """Takes an answer of this rank's process, for which it waits at most `timeout` seconds.

        Raises LeaseError where another process has taken over the run.
        """
        if self._new is None or self._is_over or self._writer is None:
            return
        try:
            answer = self._writer.receive(timeout)
        except OSError as error:
            self._lose_writer(error)
            return
        if answer is not None:
            self._answers.append(answer)
            if answer.event == "lost":
                raise LeaseError(answer.reason)
            if self.grid.is_first and answer.event in _LAST:
                self._report(answer)

    def _lose_writer(self, error: OSError) -> None:
        """Counts the save of a process that was killed as failed, unless it had published it.

        The next save starts another process.
        """
        assert self._writer is not None
        self._writer.close(kill=True)
        self._writer = None
        event = "published" if self.grid.is_first and self._has_published() else "failed"
        answer = Answer(event, 0.0, error.errno, str(error), self.grid.rank)
        self._answers.append(answer)
        if self.grid.is_first:
            self._report(answer)

    def _has_published(self) -> bool:
        """Whether the save in flight is published; False where the storage is away."""
        assert self._new is not None
        with suppress(OSError):
            return self.folder.store.has_published(self._new.step, self._new.token)
        return False

    def _report(self, answer: Answer) -> None:
        """Keeps what became of the save, for `reports`."""
        assert self._new is not None
        path, problem = self.folder.path_of(self._new.step), None
        if answer.event == "failed":
            where = f"rank {answer.rank}: " if self.grid.world_size > 1 else ""
            error = self._failure = OSError(answer.errno, f"{where}{answer.reason}")
            problem = self.folder.save_problem(path, error)
        self._reports.append(SaveReport(path, problem, self._pause, answer.seconds))

    def reports(self) -> list[SaveReport]:
        """Returns, once, what became of saves since the last call; on the first rank alone."""
        self._receive(0.0)
        reports, self._reports = self._reports, []
        return reports

    def finish(self) -> bool:
        """Waits for the save in flight; every rank calls it. False where it has failed."""
        if self._new is None:
            return True
        while not any(answer.event in {*_LAST, "written"} for answer in self._answers):
            self._receive(None)
        has_written = all(answer.event != "failed" for answer in self._answers)
        all_written = all(all_gather_objects(has_written, self.grid.world))
        if not all_written and self._writer is not None and not self._is_over:
            self._writer.abort()
        while self.grid.is_first and not self._is_over:
            self._receive(None)
        events = [answer.event for answer in self._answers]
        is_published = all_gather_objects("published" in events, self.grid.world)[0]
        if not is_published:
            self.folder.abandon(self._new.step, self._new.token, self._failure or OSError())
        self._new = None
        return is_published

    def wait_at_end(self, seconds: float = END_SECONDS) -> None:
        """Gives a save in flight some seconds after an error; not a collective call.

        Looks at files alone, since another thread may be waiting for the process.
        """
        new, deadline = self._new, time.monotonic() + seconds
        while new is not None and time.monotonic() < deadline:
            if self._has_published() or (
                not self.grid.is_first and new.outcome_path(self.grid.rank).is_file()
            ):
                return
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Ends the process, in the middle of a save if need be, and frees the memory."""
        is_writing = False
        with suppress(LeaseError):  # the run is ending
            is_writing = self.is_writing
        self._close(kill=is_writing)

    def _close(self, kill: bool) -> None:
        if self._writer is not None:
            self._writer.close(kill)
            self._writer = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None
