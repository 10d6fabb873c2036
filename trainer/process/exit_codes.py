"""How a process of ours ends: its exit code, and the one line on stderr about a user's error.

Imports little, so that `v4 --help` answers at once.
"""

import signal

FAILED = 1
"""A failure that is not the user's, and a sweep in which every trial failed."""
USER_ERROR = 2
"""Bad input, or a machine that lacks space, memory or a permission: after one line on stderr."""
INTERRUPTED = 128 + signal.SIGINT
"""After Ctrl-C, as shells report it."""
INTERRUPTED_LINE = "v4: interrupted"
ERROR_PREFIX = "v4: error: "


def error_line(error: Exception | str) -> str:
    """Returns the one line about a user's error."""
    return ERROR_PREFIX + " ".join(str(error).split())


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
