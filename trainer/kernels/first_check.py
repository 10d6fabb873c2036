"""The check of a GPU's kernels at the first start on it: once for a host, before any process group.

One of the processes with the same GPU, software and sizes checks its GPU, each operation in a
process of its own, and writes the verdicts into the user's cache; the others wait for the file. A
lease decides which of them checks, on a host and among hosts that share a home.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from data.activity import Activity, print_line
from data.errors import DataError
from data.lease import Lease, LeaseError, LeaseStopped
from trainer.config import RunConfig
from trainer.kernels.check import SECONDS, check_kernels
from trainer.kernels.gpu import Platform
from trainer.kernels.problem import needs_check, problem_of
from trainer.kernels.temporary import missing_compiler, use_writable_triton_cache
from trainer.kernels.verdict import CheckKernels, LocalVerdicts, Verdict
from trainer.kernels.verdict_file import Key, cache_folder, to_check, write_verdicts

if TYPE_CHECKING:
    import torch

TOTAL_SECONDS, TIMEOUT_SHARE = 480.0, 0.8
"""Limits of an automatic check, the second as a share of `parallel.timeout_seconds`: other
processes may already wait for this one in a process group, for as long as a collective may take."""
WAIT_SHARE = 0.1
"""How much longer than the limit of its own check a process waits for that of another, since they
may have started at different times."""
POLL_SECONDS = 0.5


def local_verdicts(
    config: RunConfig,
    device: torch.device,
    activity: Activity,
    stopped: Callable[[], bool] = lambda: False,
    check: CheckKernels = check_kernels,
    started: float | None = None,
) -> LocalVerdicts:
    """Returns the verdicts for this process's device, checking it if nobody has done so yet.

    Does nothing on a CPU, and where the config names the implementation of every operation.
    A host without a C compiler uses no Triton kernel and writes no verdicts, even if hosts
    that share its home have some.
    `activity` reports the progress; `stopped` ends check and waits, and then there are no verdicts.
    `started`: when this process was created, in seconds since 1970; temporary failures from before
    are checked again.
    """
    platform = Platform.of(device)
    if not needs_check(config, device):
        return LocalVerdicts(platform)
    fallback = config.run_dir / "kernels"
    folder = cache_folder(fallback)
    use_writable_triton_cache(folder / "triton")
    key = Key.of(platform, problem_of(config, device))
    if (missing := missing_compiler()) is not None:
        return LocalVerdicts(platform, key.digest, _all_refused(key, missing))
    first_check = _FirstCheck(
        key,
        device.index or 0,
        activity,
        check,
        stopped,
        psutil.Process().create_time() if started is None else started,
        seconds_of_check(config),
    )
    verdicts = first_check.verdicts([*dict.fromkeys([folder, fallback])])
    return LocalVerdicts(platform, key.digest, verdicts)


def seconds_of_check(config: RunConfig) -> float:
    """Returns the limit of the automatic check of a GPU."""
    timeout = config.parallel.timeout_seconds
    return TOTAL_SECONDS if timeout is None else min(TOTAL_SECONDS, TIMEOUT_SHARE * timeout)


def check_all(
    key: Key,
    index: int,
    activity: Activity,
    check: CheckKernels = check_kernels,
    deadline: float | None = None,
    stopped: Callable[[], bool] = lambda: False,
    operations: tuple[str, ...] | None = None,
    keep: Callable[[Verdict], None] = lambda verdict: None,
) -> tuple[Verdict, ...]:
    """Checks `operations`, by default all of the key's problem, on GPU `index`.

    `activity` reports progress. `deadline`: the end, by `time.monotonic`; operations that are not
    checked by then stay eager. `keep` is called with each verdict as soon as it is there. Returns
    fewer verdicts once `stopped`.
    """
    problem = key.problem
    operations = problem.operations if operations is None else operations
    count = len(operations)
    if not count:
        return ()
    print_line(
        f"kernels: checking {count} operations on {key.platform.name}, once for this GPU, torch "
        "and sizes"
    )
    verdicts: list[Verdict] = []
    for number, operation in enumerate(operations, 1):
        if stopped():
            break
        activity.what = f"checking kernels: {operation} ({number} of {count})"
        left = SECONDS if deadline is None else deadline - time.monotonic()
        if left <= 0:
            verdict = _late(operation)
        else:
            one = replace(problem, operations=(operation,))
            (verdict,) = check(one, index, _ignore, seconds=min(left, SECONDS), stopped=stopped)
            if stopped():
                break  # the signal may have ended this check
        verdicts.append(verdict)
        keep(verdict)
    for verdict in verdicts:
        if not verdict.passed:
            print_line(f"kernels: {verdict.notice}")
    return tuple(verdicts)


def _late(operation: str) -> Verdict:
    reason = "the first check had no time left for it; v4 kernels check or the next start has it"
    return Verdict(operation, False, reason, "eager", is_temporary=True)


def lease_name(key: Key) -> str:
    """Returns the name of the lease on the file of a key's verdicts."""
    return f".{key.digest[:16]}.lease"


def kinds_of_gpu() -> list[torch.device]:
    """Returns the first GPU of every kind on this host."""
    import torch

    kinds: dict[Platform, torch.device] = {}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        kinds.setdefault(Platform.of(device), device)
    return list(kinds.values())


class _FirstCheck:
    """The check of a key's kernels by this process, or its wait for that of another."""

    def __init__(
        self,
        key: Key,
        index: int,
        activity: Activity,
        check: CheckKernels,
        stopped: Callable[[], bool],
        started: float,
        seconds: float,
    ) -> None:
        self.key, self.index, self.activity = key, index, activity
        self.check, self.stopped, self.started = check, stopped, started
        self.deadline = time.monotonic() + seconds
        self._end_of_wait = self.deadline + WAIT_SHARE * seconds
        self._can_write = True

    def verdicts(self, folders: Sequence[Path]) -> dict[str, Verdict]:
        """Returns the verdicts of this process's check, or of another's; none once stopped.

        They are in the first of the folders that can be written. Raises LeaseError if none can.
        """
        log: Callable[[str], None] = print_line
        while not self.stopped():
            verdicts, operations = to_check(folders[0], self.key, self.started, log)
            if not operations:
                return verdicts
            if self._is_late():
                print_line(
                    "kernels: another process is still checking them; what it has not checked yet "
                    "runs eagerly here"
                )
                return verdicts | {name: _late(name) for name in operations}
            log = _ignore
            self.activity.what = "waiting for another process that checks the kernels"
            try:
                with Lease(
                    folders[0],
                    "v4 kernels check",
                    name=lease_name(self.key),
                    log=_ignore,
                    is_stopped=lambda: self.stopped() or self._is_late(),
                ):
                    return self._checked(folders)
            except LeaseStopped:
                continue
            except LeaseError as error:
                if not isinstance(error.__cause__, OSError):  # its owner is alive
                    time.sleep(POLL_SECONDS)
                    continue
                if len(folders) == 1:
                    raise
                print_line(f"kernels: {error} Their verdicts go into {folders[1]}")
                folders = folders[1:]
        return {}

    def _is_late(self) -> bool:
        return time.monotonic() >= self._end_of_wait

    def _checked(self, folders: Sequence[Path]) -> dict[str, Verdict]:
        """Checks what the file lacks; writes the file after every operation."""
        verdicts, operations = to_check(folders[0], self.key, self.started)
        for operation in operations:
            verdicts.pop(operation, None)

        def keep(verdict: Verdict) -> None:
            verdicts[verdict.operation] = verdict
            self._write(folders, verdicts)

        check_all(
            self.key,
            self.index,
            self.activity,
            self.check,
            self.deadline,
            self.stopped,
            operations,
            keep,
        )
        return {} if self.stopped() else verdicts

    def _write(self, folders: Sequence[Path], verdicts: Mapping[str, Verdict]) -> None:
        """Writes into the first folder that has room; logs once where none has."""
        problem = ""
        for folder in folders:
            try:
                write_verdicts(folder, self.key, verdicts.values())
            except DataError as error:
                problem = problem or str(error)
            else:
                return
        if self._can_write:
            print_line(f"kernels: {problem} This start uses the verdicts, the next checks again")
        self._can_write = False


def _all_refused(key: Key, reason: str) -> dict[str, Verdict]:
    return {
        name: Verdict(name, False, reason, "eager", is_temporary=True)
        for name in key.problem.operations
    }


def _ignore(line: str) -> None:
    """Logs nothing."""
