"""`python -m trainer.process.torchrun`: torchrun with the exit code of the rank that failed.

torchrun itself always ends with 1, and a page about every rank that exited, or a traceback after a
signal to it.
"""

import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

import psutil
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from data.activity import print_line
from trainer.process.errors import report_error
from trainer.process.exit_codes import USER_ERROR, describe_signal, exit_code_of
from trainer.process.signals import STOP_SIGNALS

_STOPPED = {exit_code_of(-number) for number in STOP_SIGNALS}
"""Exit codes of ranks that ended after a signal before they were connected."""
_CONSEQUENCES = (-signal.SIGTERM, -signal.SIGABRT)
"""Return codes of ranks that torchrun, or a communication library, ended after another failure."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 or the exit code of the first failure, 128 + n where signal n killed a rank.

    Also 128 + n after signal n to torchrun, which passes it to the ranks and waits for their end.
    Logs the signal, or torchrun's page; nothing after a user's error, which that rank has reported.
    """
    try:
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
    except OSError as error:  # of torchrun itself, which needs a temporary folder
        return report_error(error)
    return 0


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
