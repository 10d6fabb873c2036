"""The check of a GPU's kernels at the first start on it: once for a host, before any process group.

One of the processes with the same GPU, software and sizes checks its GPU, each operation in a
process of its own, and writes the verdicts into the user's cache; the others wait for the file. A
lease decides which of them checks, on a host and among hosts that share a home.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from data.activity import Activity, print_line
from data.lease import Lease, LeaseError, LeaseStopped
from trainer.config import RunConfig
from trainer.kernels.check import SECONDS, check_kernels
from trainer.kernels.gpu import Platform
from trainer.kernels.problem import needs_check, problem_of
from trainer.kernels.temporary import use_writable_triton_cache
from trainer.kernels.verdict import CheckKernels, LocalVerdicts, Verdict
from trainer.kernels.verdict_file import Key, cache_folder, to_check, write_verdicts

if TYPE_CHECKING:
    import torch

TOTAL_SECONDS, TIMEOUT_SHARE = 480.0, 0.8
"""Limits of an automatic check, the second as a share of `parallel.timeout_seconds`: other
processes may already wait for this one in a process group, for as long as a collective may take."""
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
    `activity` reports the progress; `stopped` ends check and waits, and then there are no verdicts.
    `started`: when this process was created, in seconds since 1970; temporary failures from before
    are checked again.
    """
    platform = Platform.of(device)
    if not needs_check(config, device):
        return LocalVerdicts(platform)
    folder = cache_folder(config.run_dir / "kernels")
    use_writable_triton_cache(folder / "triton")
    key = Key.of(platform, problem_of(config, device))
    started = psutil.Process().create_time() if started is None else started
    deadline = time.monotonic() + seconds_of_check(config)
    index = device.index or 0
    verdicts = _verdicts(folder, key, index, activity, stopped, check, deadline, started)
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
) -> tuple[Verdict, ...]:
    """Checks `operations`, by default all of the key's problem, on GPU `index`.

    `activity` reports progress. `deadline`: the end, by `time.monotonic`; operations that are not
    checked by then stay eager. Returns fewer verdicts once `stopped`.
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
            reason = (
                "the first check had no time left for it; v4 kernels check or the next start has it"
            )
            verdicts.append(Verdict(operation, False, reason, "eager", is_temporary=True))
            continue
        one = replace(problem, operations=(operation,))
        verdicts += check(one, index, _ignore, seconds=min(left, SECONDS), stopped=stopped)
    for verdict in verdicts:
        if not verdict.passed:
            print_line(f"kernels: {verdict.notice}")
    return tuple(verdicts)


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


def _verdicts(
    folder: Path,
    key: Key,
    index: int,
    activity: Activity,
    stopped: Callable[[], bool],
    check: CheckKernels,
    deadline: float,
    started: float,
) -> dict[str, Verdict]:
    """Returns the verdicts of this process's check, or of another's; none once `stopped`."""
    log: Callable[[str], None] = print_line
    name = lease_name(key)
    while not stopped():
        verdicts, operations = to_check(folder, key, started, log)
        if not operations:
            return verdicts
        log = _ignore
        activity.what = "waiting for another process that checks the kernels"
        try:
            with Lease(folder, "v4 kernels check", name=name, log=_ignore, is_stopped=stopped):
                verdicts, operations = to_check(folder, key, started)
                checked = check_all(key, index, activity, check, deadline, stopped, operations)
                verdicts |= {verdict.operation: verdict for verdict in checked}
                if not stopped():
                    if checked:
                        write_verdicts(folder, key, [*verdicts.values()])
                    return verdicts
        except LeaseStopped:
            break
        except LeaseError:
            if not os.access(folder, os.W_OK):
                raise
            time.sleep(POLL_SECONDS)
    return {}


def _ignore(line: str) -> None:
    """Logs nothing."""
