"""`v4 kernels check` and `v4 kernels show`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from data.activity import Activity
from data.lease import Lease
from trainer.config import RunConfig
from trainer.kernels.choose import unsupported_operations
from trainer.kernels.first_check import check_all, kinds_of_gpu, lease_name
from trainer.kernels.gpu import Platform
from trainer.kernels.problem import problem_of
from trainer.kernels.table import describe_verdicts
from trainer.kernels.temporary import use_writable_triton_cache
from trainer.kernels.verdict_file import Key, cache_folder, replace_verdict, saved_verdicts
from trainer.process.errors import PreflightError

if TYPE_CHECKING:
    from rich.table import Table


def check_command(config: RunConfig) -> Iterator[Table | str]:
    """Checks the kernels of a config on every kind of GPU of this host; yields what to print.

    Each verdict replaces the one that the cache has, as soon as it is there. A kind of GPU on which
    Triton can run nothing is a line; raises PreflightError where the host has no other.
    """
    folder = cache_folder(config.run_dir / "kernels")
    use_writable_triton_cache(folder / "triton")
    problems = [(kind, problem_of(config, kind)) for kind in kinds_of_gpu()]
    for kind, problem in problems:
        platform, reasons = Platform.of(kind), unsupported_operations(config, kind)
        if not problem.operations:
            why = "; ".join(dict.fromkeys(reasons.values()))
            line = f"every operation runs eagerly on {platform.name}: {why}"
            if not any(other.operations for _, other in problems):
                raise PreflightError(f"v4 kernels check: {line}")
            yield line
            continue
        key = Key.of(platform, problem)
        with (
            Lease(folder, "v4 kernels check", name=lease_name(key)),
            Activity("checking kernels") as activity,
        ):
            keep = partial(replace_verdict, folder, key)
            verdicts = check_all(key, kind.index, activity, keep=keep)
        yield from describe_verdicts(key.to_dict(), verdicts)
        for operation, reason in reasons.items():
            yield f"{operation}: its Triton kernel is not used on this GPU: {reason}"
    yield f"verdicts are kept in {folder}"


def show_command() -> Iterator[Table | str]:
    """Yields all verdicts of the user's cache, the newest first. Raises PreflightError if none."""
    folder = cache_folder()
    verdicts = list(saved_verdicts(folder))
    if not verdicts:
        raise PreflightError(
            f"v4 kernels show: {folder} has no verdicts; v4 kernels check makes them, on a machine "
            "with a GPU, and so does the first start of a run there"
        )
    for key, of_key in verdicts:
        yield from describe_verdicts(key, of_key)
