"""Ray: a task of Ray for each task, in processes that Ray keeps between them."""

import logging
import os
import socket
from collections import deque
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data.errors import DataError
from data.prepare.engines.remote import Job, RemoteEngine, open_preparation, run_job
from data.prepare.task import Preparation, Task

_POLL_SECONDS = 1.0
_CONNECT_SECONDS = 10.0


class RayEngine(RemoteEngine):
    """The cluster at `data.ray.address`, by default the one that this host belongs to."""

    def __init__(self, preparation: Preparation, visible: bool) -> None:
        super().__init__(preparation, visible)
        self.references: dict[Any, Job] = {}

    def __enter__(self) -> Self:
        self.ray = _connect(self.preparation.config.ray.address)
        cores = int(self.ray.cluster_resources().get("CPU", 1))
        self.workers = min(self.preparation.config.prepare_workers or cores, cores)
        # A process that dies is counted as an attempt here, so Ray itself tries once.
        self.function = self.ray.remote(num_cpus=1, max_retries=0)(_work)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.ray.shutdown()  # ends the processes of this driver

    def _submit(self, waiting: deque[Task], running: int) -> Iterable[Job]:
        for _ in range(min(self.workers - running, len(waiting))):
            job = self._job([waiting.popleft()])
            reference = self.function.remote(os.getcwd(), str(self.files.absolute()), job.name)
            self.references[reference] = job
            yield job

    def _wait(self, running: dict[str, Job]) -> dict[str, str]:
        ended, _ = self.ray.wait(list(self.references), timeout=_POLL_SECONDS)
        return {self.references.pop(reference).name: self._end(reference) for reference in ended}

    def _end(self, reference: Any) -> str:
        """What is known of how a task of Ray ended; DataError where it could not begin."""
        try:
            blind = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines()  # of a Python error, the last line names it
            return lines[-1] if isinstance(error, self.ray.exceptions.RayTaskError) else lines[0]
        if blind:
            raise DataError(blind)
        return "it left no report"


def _work(directory: str, files: str, name: str) -> str:
    """Runs a job in a process of Ray; returns what keeps this host from it, or nothing."""
    try:
        os.chdir(directory)
        preparation = _open(files)
    except FileNotFoundError as error:
        return (
            f"the host {socket.gethostname()} of Ray does not see {error.filename}, in which the "
            "work is done; set `data.shards`, or `data.work_folder`, to a folder that all hosts "
            "share."
        )
    run_job(Path(files), name, preparation)
    return ""


@cache
def _open(files: str) -> Preparation:
    return open_preparation(Path(files))


def _connect(address: str | None) -> Any:
    """The module of Ray, connected to a cluster."""
    try:
        import ray
    except ImportError:
        raise DataError(
            "data.engine is ray, which is not installed; install it on all hosts with "
            "`pip install 'v4-pretrain[ray]'`."
        ) from None
    try:
        if address is not None:
            host, port = address.rsplit(":", 1)
            # Ray itself waits for minutes, and logs them.
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        ray.init(
            address=address or "auto",
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"RAYON_NUM_THREADS": "1"}},
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"data.engine is ray, and no cluster answers at {address or 'the default address'}: "
            f"{' '.join(str(error).split())}"
        ) from error
    return ray
