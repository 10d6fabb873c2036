"""How a process of ours ends: its exit code, and the one line on stderr about a user's error.

Imports nothing, so that `v4 --help` answers at once.
"""

FAILED = 1
"""A failure that is not the user's, and a sweep in which every trial failed."""
USER_ERROR = 2
"""Bad input: after one line on stderr."""
ERROR_PREFIX = "v4: error: "


def error_line(error: Exception | str) -> str:
    """Returns the one line about a user's error."""
    return ERROR_PREFIX + " ".join(str(error).split())
