"""Profiles of single steps, in `profiles` of the run folder.

A profile is that of `profile.steps`, or of the steps after SIGUSR1 to any rank. Each of
`profile.ranks` writes a trace of torch.profiler in Chrome's format (chrome://tracing, Perfetto), a
table of its ten longest operations, and on a GPU a snapshot of the allocator's memory
(pytorch.org/memory_viz). Otherwise nothing is recorded.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data.activity import print_line
from data.errors import DataError
from data.files import write_atomically
from trainer.config import RunConfig
from trainer.parallel.grid import Grid
from trainer.process.signals import ProfileRequest

TABLE_ROWS = 10
_HISTORY_ENTRIES = 200_000  # of allocations in a memory snapshot


class Profiler:
    """Profiles steps between `before_step` and `after_step`, called for each of them.

    `log` gets a line about each profile. One that cannot be written is a warning on stderr.
    """

    def __init__(
        self, config: RunConfig, grid: Grid, request: ProfileRequest, log: Callable[[str], None]
    ) -> None:
        self.config, self.grid, self.request, self.log = config.profile, grid, request, log
        self.folder = config.run_dir / "profiles"
        self._planned = self.config.steps
        self._last = 0  # of the profile that is running
        self._name = ""
        self._profile: Any = None

    def begin(self, step: int) -> None:
        """Begins a run whose next step is `step`, from 1."""
        if self._planned is not None and self._planned[0] < step:
            first, last = self._planned
            self.log(f"profile.steps = [{first}, {last}]: the run is at step {step} already")
            self._planned = None

    def before_step(self, step: int) -> None:
        """Starts the profile that is planned for `step`, from 1."""
        if self._planned is not None and step == self._planned[0]:
            self._start(*self._planned)
            self._planned = None

    def agreed(self, step: int) -> None:
        """Plans a profile from the step after `step`: a rank was asked for one."""
        self.request.requested = False
        if not self._last and self._planned is None:
            self._planned = (step + 1, step + self.config.steps_on_signal)

    def after_step(self, step: int) -> None:
        """Writes the profile whose last step this was."""
        if self._last and step >= self._last:
            self.close()

    def close(self) -> None:
        """Writes the profile that is running, as at the end of a run."""
        if not self._last:
            return
        self._last = 0
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        try:
            self._write(profile)
        except (OSError, DataError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            print_line(f"v4: warning: no profile of rank {self.grid.rank}: {reason}", sys.stderr)
            return
        finally:
            if self.grid.device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)
        text = f"profile: {self.folder / self._name}"
        if self.grid.device.type != "cuda":
            text += "; without a memory snapshot, since torch records the allocations of GPUs only"
        self.log(text)

    def _start(self, first: int, last: int) -> None:
        self._last, self._name = last, f"steps-{first:08d}-{last:08d}"
        if self.grid.rank not in self.config.ranks:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.grid.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_HISTORY_ENTRIES)
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profile.start()

    def _write(self, profile: Any) -> None:
        """Writes the files of this rank; each appears whole."""
        folder = self.folder / self._name
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"rank-{self.grid.rank:05d}"
        write_whole(folder / f"{stem}.trace.json.gz", profile.export_chrome_trace)
        on_gpu = self.grid.device.type == "cuda"
        order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        averages = profile.key_averages(group_by_input_shape=True)
        write_atomically(
            folder / f"{stem}.operations.txt", averages.table(sort_by=order, row_limit=TABLE_ROWS)
        )
        if on_gpu:
            write_whole(folder / f"{stem}.memory.pickle", torch.cuda.memory._dump_snapshot)


def write_whole(path: Path, write: Callable[[str], Any]) -> None:
    """Lets `write` write a file beside `path`, with the same endings, and renames it."""
    temporary = path.with_name(f".{path.name}")
    write(str(temporary))
    temporary.replace(path)
