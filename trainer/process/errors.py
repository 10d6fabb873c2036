"""Expected errors: each is reported as one sentence without a traceback, with exit code 2.

So are the machine's: files that cannot be read or written, memory that is not there. Those that may
pass, as a file server that is away, have exit code 1: a restart is worth trying. Ctrl-C ends with
exit code 130. Everything else is a fault of ours and keeps its traceback.
"""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable

from data.activity import print_line
from data.errors import DataError
from model.errors import ModelConfigError
from optim.errors import OptimError
from trainer.config import ConfigError
from trainer.process.exit_codes import (
    FAILED,
    INTERRUPTED,
    INTERRUPTED_LINE,
    USER_ERROR,
    error_line,
    exit_code_of,
)
from trainer.process.source import own_file


class CheckpointError(ValueError):
    """A checkpoint that cannot be used."""


class SaveError(CheckpointError):
    """A checkpoint that could not be written; earlier ones are untouched."""


class DivergedError(ValueError):
    """A run that cannot go on: losses stay non-finite, or spikes cannot be rolled back."""


class ExportError(ValueError):
    """A Hugging Face folder that cannot be written or read."""


class PreflightError(ValueError):
    """Processes that cannot train together, or not on this hardware."""


class OutOfMemoryError(ValueError):
    """A device that is full; the message says which settings would help most."""


class TaskError(ValueError):
    """A task of lm-eval that cannot be opened or evaluated."""


class PostTrainingError(ValueError):
    """A teacher, checker, sandbox or set of prompts that post-training cannot use."""


class ReportError(ValueError):
    """A run whose metrics cannot be drawn."""


_NOT_LOADED = ("failed to map segment", os.strerror(errno.ENOMEM))
"""Why the loader of libraries, or the system, finds no room in memory."""

_PASSING = frozenset(
    {
        *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOLINK),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
        *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENOTCONN),
        *(errno.ESHUTDOWN, errno.EPROTO),
    }
)
"""Errors of file systems, their servers and networks that may have gone at the next start; nobody
has to change anything. Not among them: no such file, no permission, no space, a read-only disk."""

USER_ERRORS: tuple[type[ValueError], ...] = (
    ConfigError,
    ModelConfigError,
    DataError,
    OptimError,
    CheckpointError,
    DivergedError,
    ExportError,
    PreflightError,
    OutOfMemoryError,
    PostTrainingError,
    ReportError,
    TaskError,
)


def run_or_explain(action: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit code: the result or 0, or that of `report_error`."""
    try:
        code = action()
        sys.stdout.flush()  # its disk may be full
    except BaseException as error:
        return report_error(error)
    return code or 0


def report_error(error: BaseException) -> int:
    """Prints one line about an error that ends a command, and returns the exit code.

    Raises the error itself where it is a fault of ours.
    """
    _flush_or_drop_stdout()
    if isinstance(error, KeyboardInterrupt):
        print_line(INTERRUPTED_LINE, sys.stderr)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):  # the reader has what it wanted, as `head` does
        return exit_code_of(-signal.SIGPIPE)
    if (sentence := explain(error)) is None:
        raise error
    code = exit_code(error)
    print_line(error_line(sentence, code), sys.stderr)
    return code


def exit_code(error: BaseException) -> int:
    """Returns the exit code for an error: 2 where every restart would end the same, else 1."""
    return FAILED if explain(error) is None or may_pass(error) else USER_ERROR


def may_pass(error: BaseException) -> bool:
    """Whether an error, or what led to it, is one of a file server or a network that is away."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _PASSING:
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _flush_or_drop_stdout() -> None:
    """Writes what is left for stdout; drops it if that fails, since Python would fail at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: BaseException) -> str | None:
    """Returns a sentence about an error of the user or the machine; None for a fault of ours."""
    if isinstance(error, USER_ERRORS):
        return str(error)
    if (allocation := failed_allocation(error)) is not None:
        return f"out of memory: {allocation}; this machine, or the limit of this process, has less"
    if not isinstance(error, OSError):
        return None
    problem = error.strerror or str(error) or type(error).__name__
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    # A write to an open file does not know the file's name.
    return f"{' to '.join(names) or _line_of_ours(error)}: {problem}"


def failed_allocation(error: BaseException) -> str | None:
    """Returns what could not be allocated, on the host or on a GPU; None for another error.

    torch has a class for GPUs alone; its allocator on the host raises RuntimeError. Under a limit
    of address space a library cannot be loaded.
    """
    text = str(error)
    cause = error.__context__ or error  # where a package reports a library of its own
    for reason in (text, str(cause)):
        if isinstance(error, ImportError | OSError) and any(part in reason for part in _NOT_LOADED):
            return reason
    if isinstance(error, MemoryError):
        return text or "no memory is left"
    if isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or os.strerror(errno.ENOMEM) in text
    ):
        return "; ".join(text.split("DefaultCPUAllocator: ")[-1].split(". ")[:2])
    return None


def _line_of_ours(error: BaseException) -> str:
    """Returns the line of our code that an error came from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [(file, frame.lineno) for frame in frames if (file := own_file(frame.filename))]
    return f"{ours[-1][0]}, line {ours[-1][1]}"
