"""How a process of ours ends: its exit code, and the one line on stderr about a user's error.

Imports little, so that `v4 --help` answers at once.
"""

import signal

FAILED = 1
"""A failure that the same command may outlive: a fault of ours, after its traceback; a file server
or a network that is away for a while, after one line on stderr. Also a sweep in which every trial
failed."""
USER_ERROR = 2
"""Bad input, or a machine that lacks space, memory or a permission: after one line on stderr."""
START_AGAIN = 75
"""Of all ranks at the border of two phases with other degrees (`phases.parallel`), after the
checkpoint: they are to be started again, and it is no failure. The number is EX_TEMPFAIL of
sysexits.h."""
INTERRUPTED = 128 + signal.SIGINT
"""After Ctrl-C, as shells report it."""
INTERRUPTED_LINE = "v4: interrupted"
ERROR_PREFIX = "v4: error: "
"""Of a user's error, which is the same after every restart."""
FAILURE_PREFIX = "v4: failed: "


def error_line(error: Exception | str, code: int = USER_ERROR) -> str:
    """Returns the one line about an error that ends with this exit code."""
    prefix = ERROR_PREFIX if code == USER_ERROR else FAILURE_PREFIX
    return prefix + " ".join(str(error).split())


def exit_code_of(returncode: int) -> int:
    """Returns the exit code for a subprocess's return code: 128 + n after signal n."""
    return returncode if returncode >= 0 else 128 - returncode


def describe_signal(returncode: int) -> str:
    """Returns `was killed by SIGKILL (signal 9)`, with its likely cause."""
    try:
        name = f"{signal.Signals(-returncode).name} (signal {-returncode})"
    except ValueError:  # a real-time signal
        name = f"signal {-returncode}"
    causes = {
        signal.SIGKILL: "; if nobody did that, the kernel ended it because memory ran out (dmesg, "
        "or the cgroup's memory.events, shows it): v4 plan --dry-run shows what a config needs",
        signal.SIGBUS: "; a file that it had mapped became shorter, or /dev/shm is full",
    }
    return f"was killed by {name}{causes.get(-returncode, '')}"  # type: ignore[call-overload]
