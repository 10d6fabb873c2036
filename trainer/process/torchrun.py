"""`python -m trainer.process.torchrun`: torchrun with the exit code of the rank that failed.

torchrun itself always ends with 1, and a page about every rank that exited, or a traceback after a
signal to it. Ranks that end with `START_AGAIN` are started again, however often, and
`--max-restarts` counts failures alone; after a user's error there is no restart, which would end
with the same.
"""

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import psutil
from torch.distributed.elastic.agent.server.api import (
    DEFAULT_ROLE,
    RunResult,
    WorkerGroup,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api as launcher
from torch.distributed.run import determine_local_world_size, parse_args, parse_min_max_nnodes
from torch.distributed.run import main as torchrun

from data.activity import print_line
from data.processes import send_if_handled
from trainer.config import ConfigError, load_run
from trainer.process.command_line import BORDERS
from trainer.process.errors import report_error
from trainer.process.exit_codes import (
    START_AGAIN,
    USER_ERROR,
    describe_signal,
    exit_code_of,
)
from trainer.process.signals import PROFILE_SIGNAL, STOP_SIGNALS

_STOPPED = {exit_code_of(-number) for number in STOP_SIGNALS}
"""Exit codes of ranks that ended after a signal before they were connected."""
_CONSEQUENCES = (-signal.SIGTERM, -signal.SIGABRT)
"""Return codes of ranks that torchrun, or a communication library, ended after another failure."""


class Agent(LocalElasticAgent):
    """torchrun's agent of one host, for which the end of its ranks may not be that of the job.

    Where they end with `START_AGAIN`, so do those of the other hosts, and all agents meet again as
    after a failure. Where a host joins (`--nnodes MIN:MAX`), the first agent to see it stops its
    ranks; all ranks save together and end with 0, and all agents meet with the new host.
    """

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._wait_for_ends()
        ended = {rank.pid for rank in self._ranks() if rank.poll()}
        result = super()._monitor_workers(worker_group)
        for number, failure in [*result.failures.items()]:
            if ended and failure.exitcode == -signal.SIGKILL and failure.pid not in ended:
                del result.failures[number]  # torchrun has killed it, since another one had failed
        if any(failure.exitcode == START_AGAIN for failure in result.failures.values()):
            # One attempt more, which has files of its own, with as many left as before.
            worker_group.spec.max_restarts += 1
            self._remaining_restarts += 1
            os.environ[BORDERS] = str(int(os.environ.get(BORDERS, "0")) + 1)
        elif any(failure.exitcode == USER_ERROR for failure in result.failures.values()):
            self._remaining_restarts = 0
        elif result.state == WorkerState.SUCCEEDED and _is_joined(worker_group):
            return RunResult(WorkerState.HEALTHY)  # torchrun then begins with the new host
        return result

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        """Raises SystemExit if a rank ended with a user's error after a signal to torchrun."""
        try:
            return super().run(role)
        except SignalException:
            if any(rank.poll() == USER_ERROR for rank in self._ranks()):
                raise SystemExit(USER_ERROR) from None
            raise

    def _ranks(self) -> list[subprocess.Popen[bytes]]:
        if self._pcontext is None:
            return []
        assert isinstance(self._pcontext, SubprocessContext)
        return [handler.proc for handler in self._pcontext.subprocess_handlers.values()]

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """Gives ranks that end for another host the time of `--shutdown-timeout`, not torch's."""
        self._shutdown(timeout=self._shutdown_timeout)

    def _wait_for_ends(self) -> None:
        """Waits for all ranks where one has ended with `START_AGAIN`: torchrun would end them."""
        ranks = self._ranks()
        if any(rank.poll() == START_AGAIN for rank in ranks):
            for rank in ranks:
                with suppress(subprocess.TimeoutExpired):
                    rank.wait(self._shutdown_timeout)


def _is_joined(worker_group: WorkerGroup) -> bool:
    """Whether another host waits for the ranks of this one to stop."""
    return worker_group.spec.rdzv_handler.num_nodes_waiting() > 0


def check_sizes(arguments: Sequence[str] | None) -> None:
    """Raises ConfigError where a training does not fit one of the numbers of hosts it may get."""
    options = parse_args(arguments)
    low, high = parse_min_max_nnodes(options.nnodes)
    if low == high or options.training_script != "trainer":
        return
    words = argparse.ArgumentParser()
    words.add_argument("config")
    words.add_argument("overrides", nargs="*")
    training = words.parse_args(options.training_script_args)
    config = load_run(training.config, training.overrides)
    for nodes in range(low, high + 1):
        try:
            config.check_world(nodes * determine_local_world_size(options.nproc_per_node))
        except ConfigError as error:
            raise ConfigError(f"{nodes} of --nnodes {options.nnodes}: {error}") from None


def _is_failure(record: logging.LogRecord) -> bool:
    """Whether a line of torchrun is about a rank that failed, or about something else."""
    return not (isinstance(record.args, tuple) and START_AGAIN in record.args)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 or the exit code of the first failure, 128 + n where signal n killed a rank.

    Also 128 + n after signal n to torchrun, which passes it to the ranks and waits for their end;
    USER_ERROR if that is how one ends, as where the disk is full for the last checkpoint.
    Logs the signal, or torchrun's page; nothing after a user's error, which that rank has reported.
    PROFILE_SIGNAL goes to the ranks.
    """
    launcher.LocalElasticAgent = Agent  # type: ignore[misc]  # torchrun has no option for it
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_is_failure)
    signal.signal(PROFILE_SIGNAL, _pass_to_ranks)
    try:
        check_sizes(arguments)
        torchrun(arguments)
    except ChildFailedError as error:
        rank, code, pid = _root_cause(error)
        if code < 0:
            where = f"rank {rank} on {socket.gethostname()} (pid {pid})"
            print_line(f"v4: {where} {describe_signal(code)}", sys.stderr)
        elif code not in (USER_ERROR, *_STOPPED):
            print_line(f"torchrun: {type(error).__name__}: {error}", sys.stderr)
        return exit_code_of(code)
    except SignalException as stop:
        _end_ranks(stop.sigval)
        return exit_code_of(-stop.sigval)
    except (ConfigError, OSError) as error:  # torchrun itself needs a temporary folder
        return report_error(error)
    return 0


def _pass_to_ranks(number: int, frame: FrameType | None) -> None:
    for rank in psutil.Process().children():
        send_if_handled(rank, number)


def _end_ranks(number: int) -> None:
    """Passes a signal to ranks that torchrun left, and waits for their end; another one kills them.

    It leaves those that it was starting when its signal came.
    """
    ranks = psutil.Process().children()
    try:
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        psutil.wait_procs(ranks)
    except SignalException:
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.kill()


def _root_cause(error: ChildFailedError) -> tuple[int, int, int]:
    """Returns rank, return code and process id of the failure that led to the others.

    The death of a process breaks the connections of other ranks, whose errors may be reported in
    the same second.
    """
    killed = [
        rank
        for rank, failure in error.failures.items()
        if failure.exitcode < 0 and failure.exitcode not in _CONSEQUENCES
    ]
    rank = killed[0] if killed else error.get_first_failure()[0]
    failure = error.failures[rank]
    return rank, failure.exitcode, failure.pid


if __name__ == "__main__":
    sys.exit(main())
